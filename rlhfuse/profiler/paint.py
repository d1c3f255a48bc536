"""What a lane was in at every moment: overlapping spans cut into pieces with one span each."""

import numpy as np

from rlhfuse.profiler.table import RANKS, Codes
from rlhfuse.schedules.compiled import Floats, Ints, compiled


def paint(start: Floats, end: Floats, rank: Codes, wall: float) -> tuple[Floats, Ints]:
    """Cut 0 to `wall` into pieces with one span each, or none.

    Args:
        start: spans by start, of equal starts the longest first.
        rank: where spans overlap, the highest rank has the moment, then the latest start.

    Returns:
        Edges, one more than pieces; and per piece the index of its span, or -1.
    """
    edges = np.zeros(2 * len(start) + 2)
    owner = np.full(2 * len(start) + 1, -1, dtype=np.int64)
    count = _sweep(start, end, rank.astype(np.int64), wall, edges, owner)
    return edges[: count + 1], owner[:count]


@compiled
def _sweep(start: Floats, end: Floats, rank: Ints, wall: float, edges: Floats, owner: Ints) -> int:
    """Fill `edges` and `owner`; the number of pieces.

    One stack per rank: of spans by start, the last one pushed that has not ended is the inner one.
    """
    below = np.full(len(start), -1, dtype=np.int64)
    heads = np.full(RANKS, -1, dtype=np.int64)
    now, count, following = 0.0, 0, 0
    while now < wall:
        while following < len(start) and start[following] <= now:
            if end[following] > now:
                below[following] = heads[rank[following]]
                heads[rank[following]] = following
            following += 1
        top = -1
        for level in range(RANKS - 1, -1, -1):
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
