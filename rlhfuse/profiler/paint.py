"""What a lane was in at every moment: overlapping spans cut into pieces with one span each."""

from collections.abc import Callable, MutableSequence, Sequence
from functools import cache

import numpy as np

from rlhfuse.profiler.arrays import Codes, Floats, Ints
from rlhfuse.profiler.table import RANKS

_MANY = 50_000  # spans from which on loading the compiler pays
_Numbers = Sequence[float]
_Indices = MutableSequence[int]
_Sweep = Callable[..., int]


def paint(start: Floats, end: Floats, rank: Codes, wall: float) -> tuple[Floats, Ints]:
    """Cut 0 to `wall` into pieces with one span each, or none.

    Args:
        start: spans by start, of equal starts the longest first.
        rank: where spans overlap, the highest rank has the moment, then the latest start.

    Returns:
        Edges, one more than pieces; and per piece the index of its span, or -1.
    """
    size = 2 * len(start) + 2
    edges, owner = np.zeros(size), np.full(size, -1, dtype=np.int64)
    below, heads = np.full(len(start), -1), np.full(RANKS, -1)
    if len(start) > _MANY:
        count = _compiled()(start, end, rank.astype(np.int64), wall, edges, owner, below, heads)
        return edges[: count + 1], owner[:count]
    plain_edges, plain_owner = [0.0] * size, [-1] * size
    count = _sweep(
        start.tolist(),
        end.tolist(),
        rank.tolist(),
        wall,
        plain_edges,
        plain_owner,
        below.tolist(),
        heads.tolist(),
    )
    return np.array(plain_edges[: count + 1]), np.array(plain_owner[:count], dtype=np.int64)


@cache
def _compiled() -> _Sweep:
    from rlhfuse.schedules.compiled import compiled

    return compiled(_sweep)


def _sweep(
    start: _Numbers,
    end: _Numbers,
    rank: Sequence[int],
    wall: float,
    edges: MutableSequence[float],
    owner: _Indices,
    below: _Indices,
    heads: _Indices,
) -> int:
    """Fill `edges` and `owner`; the number of pieces.

    One stack per rank: of spans by start, the last one pushed that has not ended is the inner one.
    """
    now, count, following = 0.0, 0, 0
    while now < wall:
        while following < len(start) and start[following] <= now:
            if end[following] > now:
                below[following] = heads[rank[following]]
                heads[rank[following]] = following
            following += 1
        top = -1
        for level in range(len(heads) - 1, -1, -1):
            while heads[level] >= 0 and end[heads[level]] <= now:
                heads[level] = below[heads[level]]
            if heads[level] >= 0:
                top = heads[level]
                break
        until = wall
        if top >= 0:
            until = min(until, end[top])
        if following < len(start):
            until = min(until, start[following])
        owner[count] = top
        count += 1
        edges[count] = until
        now = until
    return count
