"""The pieces of every lane's time, each with its cause. Columns in, columns out.

Times are rounded to a grid of a power of two so fine (2^-44 of the window and finer) that no clock
sees it, and so coarse that sums of durations are exact in float64: causes add up to the wall time
exactly, per lane and over all lanes, in any order.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats, Ints
from rlhfuse.profiler.causes import CAUSES, CODE, Cause
from rlhfuse.profiler.context import Context
from rlhfuse.profiler.paint import paint
from rlhfuse.profiler.rounds import Round
from rlhfuse.profiler.table import KIND_CODE, UNKNOWN, SpanTable
from rlhfuse.timeline import Kind

_WAIT = KIND_CODE[Kind.WAIT]
_LONGEST_S = 1e13
_SHORTEST_S = 1e-200  # below it, a tick is no number
# Causes that a wait inside a training round may name; else the round knows better.
_NAMED_IN_ROUNDS = np.array(
    [CODE[c] for c in (Cause.STRAGGLER, Cause.UPSTREAM, Cause.DOWNSTREAM)], dtype=np.int8
)


@dataclass(frozen=True, slots=True)
class Grid:
    """Seconds from a window's start, rounded so that sums are exact."""

    start_s: float
    wall_s: float
    tick_s: float

    @staticmethod
    def of(start_s: float, end_s: float, num_lanes: int) -> "Grid":
        """The window's grid.

        Raises:
            ValueError: its times are infinite, or beyond any clock.
        """
        length = end_s - start_s
        if not abs(start_s) + abs(end_s) < _LONGEST_S:
            raise ValueError(f"spans from {start_s:g} to {end_s:g} s: no clock shows such times")
        if not length > _SHORTEST_S:
            return Grid(start_s, 0.0, 1.0)
        exponent = math.frexp(length)[1] + max(8, num_lanes.bit_length())
        tick_s = 2.0 ** (exponent - 53)
        return Grid(start_s, round(length / tick_s) * tick_s, tick_s)

    def at(self, times_s: Floats) -> Floats:
        """Moments of the timeline as exact seconds within the window."""
        inside = np.clip(times_s - self.start_s, 0.0, self.wall_s)
        rounded: Floats = np.rint(inside / self.tick_s) * self.tick_s
        return rounded

    def snapped(self, length_s: float) -> float:
        return round(length_s / self.tick_s) * self.tick_s


@dataclass(frozen=True, slots=True)
class LaneSegments:
    """Touching pieces that cover the window: `edges_s` [n + 1] from the window's start, `cause`
    [n] by number, `span` [n] the row of the work done, or -1."""

    edges_s: Floats
    cause: Ints
    span: Ints

    def seconds(self) -> dict[Cause, float]:
        """Exact sums by cause, in the order of `Cause`, without zeros."""
        sums = np.bincount(self.cause, np.diff(self.edges_s), minlength=len(CAUSES))
        return {cause: float(sums[code]) for code, cause in enumerate(CAUSES) if sums[code] > 0}


def all_segments(
    table: SpanTable, lanes: Sequence[str], start_s: float, end_s: float
) -> tuple[Grid, dict[str, LaneSegments]]:
    """Every lane's segments over one window."""
    grid = Grid.of(start_s, end_s, len(lanes))
    context = Context.of(table, lanes)
    return grid, {
        lane: _lane(table, lane, rows, context, grid) for lane, rows in _rows(table, lanes)
    }


def _rows(table: SpanTable, lanes: Sequence[str]) -> Iterator[tuple[str, Ints]]:
    """Per lane its rows by start, of equal starts the longest first."""
    order = np.lexsort((-table.end_s, table.start_s, table.lane))
    places = {lane: place for place, lane in enumerate(table.lanes)}
    sorted_lanes = table.lane[order]
    for lane in lanes:
        if lane not in places:
            yield lane, np.empty(0, dtype=np.int64)
            continue
        first, last = np.searchsorted(sorted_lanes, [places[lane], places[lane] + 1])
        yield lane, order[first:last]


def _lane(table: SpanTable, lane: str, rows: Ints, context: Context, grid: Grid) -> LaneSegments:
    edges, owner = paint(
        grid.at(table.start_s[rows]), grid.at(table.end_s[rows]), table.rank[rows], grid.wall_s
    )
    if not len(owner):
        return LaneSegments(np.zeros(1), owner, owner)
    span = np.where(owner >= 0, rows[np.maximum(owner, 0)] if len(rows) else owner, -1)
    edges, span = _cut(edges, span, grid.at(context.cuts(lane)))
    known = np.where(span >= 0, table.cause[np.maximum(span, 0)], UNKNOWN).astype(np.int64)
    waits = (span >= 0) & (table.kind[np.maximum(span, 0)] == _WAIT)
    idle = (span < 0) | waits
    middles = (edges[:-1] + edges[1:]) / 2
    cause = np.where(idle, _outside(lane, middles, known, context, grid), known)
    pieces = _Pieces(edges, middles, waits, known, np.flatnonzero(idle))
    for training in context.rounds:
        if training.has(lane):
            _inside(training, lane, pieces, cause, grid)
    span = np.where(waits, -1, span)
    ready_s = 0.0 if context.early_scoring else context.scoring_after_s.get(lane, 0.0)
    edges, cause, span = _hold(edges, cause, span, grid.snapped(ready_s))
    return _merged(edges, cause, span)


def _cut(edges: Floats, span: Ints, moments: Floats) -> tuple[Floats, Ints]:
    """The same pieces, cut at more moments."""
    finer = np.union1d(edges, moments)
    return finer, span[np.searchsorted(edges, finer[:-1], side="right") - 1]


def _outside(lane: str, middles: Floats, known: Ints, context: Context, grid: Grid) -> Ints:
    """Causes of idle pieces where no training round explains them: the first that holds."""
    times = middles + grid.start_s
    begin, finish = context.generation
    own_end = context.last_generated_s.get(lane, begin)
    generating = (times >= begin) & (times < finish)
    first_s, last_s = context.kernels_s.get(lane, (0.0, 0.0))
    chosen: Ints = np.select(
        [
            known != UNKNOWN,
            generating & (times < own_end),
            generating,
            context.rewarding.covers(times),
            context.syncing.covers(times),
            context.saving.covers(times),
            (times >= first_s) & (times < last_s),
            context.staging.covers(times),
        ],
        [
            known,
            CODE[Cause.HOST_GAP],
            CODE[Cause.LONG_TAIL],
            CODE[Cause.REWARD_WAIT],
            CODE[Cause.WEIGHT_SYNC],
            CODE[Cause.CHECKPOINT_WAIT],
            CODE[Cause.HOST_GAP],
            CODE[Cause.STAGE_WAIT],
        ],
        CODE[Cause.CONTROLLER],
    )
    return chosen


@dataclass(frozen=True, slots=True)
class _Pieces:
    """Pieces of one lane: what `_inside` needs to know of them."""

    edges: Floats
    middles: Floats
    waits: Bools
    known: Ints
    idle: Ints  # indices of the pieces to explain


def _inside(training: Round, lane: str, pieces: _Pieces, cause: Ints, grid: Grid) -> None:
    """Overwrite the causes of idle pieces that lie in a training round of this lane."""
    start, end = grid.at(np.array([training.start_s, training.end_s]))
    own = pieces.middles[pieces.idle]
    here = pieces.idle[np.searchsorted(own, start) : np.searchsorted(own, end)]
    if not len(here):
        return
    steps = training.lanes[lane]
    starts, ready = grid.at(steps.starts), grid.at(steps.ready_s)
    following = np.searchsorted(starts, pieces.edges[here + 1])
    cool = following == len(starts)
    following = np.minimum(following, len(starts) - 1)
    waits = pieces.waits[here]
    # Names of other makers: believe a recorded wait, and gaps where nothing can be waited for.
    until = np.where(steps.foreign[following], np.where(waits, np.inf, -np.inf), ready[following])
    until = np.where(steps.foreign[following] & ~steps.free[following], np.inf, until)
    first = np.where(following == 0, CODE[Cause.WARM_UP], steps.blocked[following])
    # The input was there, or on its way: a recorded wait is its transfer, a bare gap is ours.
    after = np.where(waits, CODE[Cause.TRANSFER], CODE[Cause.HOST_GAP])
    found = np.where(pieces.middles[here] < until, first, after)
    found = np.where(cool, CODE[Cause.COOL_DOWN], found)
    named = np.isin(pieces.known[here], _NAMED_IN_ROUNDS)
    cause[here] = np.where(named, pieces.known[here], found)


def _hold(edges: Floats, cause: Ints, span: Ints, ready_s: float) -> tuple[Floats, Ints, Ints]:
    """A barrier between generation and scoring hides work that this lane could have done: the
    first `ready_s` seconds of its tail are the barrier's fault, not the tail's."""
    tail = np.flatnonzero(cause == CODE[Cause.LONG_TAIL])
    if ready_s <= 0 or not len(tail):
        return edges, cause, span
    reach = np.cumsum(edges[tail + 1] - edges[tail])
    last = int(np.searchsorted(reach, ready_s))
    cause[tail[:last]] = CODE[Cause.STAGE_WAIT]
    if last == len(tail):
        return edges, cause, span
    piece = int(tail[last])
    moment = edges[piece + 1] - (reach[last] - ready_s)
    return (
        np.insert(edges, piece + 1, moment),
        np.insert(cause, piece, CODE[Cause.STAGE_WAIT]),
        np.insert(span, piece, -1),
    )


def _merged(edges: Floats, cause: Ints, span: Ints) -> LaneSegments:
    """Touching segments of one cause and one span as one."""
    new = np.concatenate([[True], (np.diff(cause) != 0) | (np.diff(span) != 0)])
    return LaneSegments(np.append(edges[:-1][new], edges[-1]), cause[new], span[new])
