"""Ranks on one clock: no task may begin before its input, computed on another rank, was there.

Between two ranks that send to each other, every message bounds the difference of their clocks from
one side. The line in the middle of the room that all bounds leave is the estimate (exact where
messages take equally long both ways), half the room its uncertainty. Clocks that drift apart leave
little or no room for a constant; then the line may lean. Communication kernels, which last until
all partners are through, end together: there the median difference of ends is the estimate.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.profiler.arrays import Floats
from rlhfuse.profiler.rounds import TRAINING_KINDS, find_rounds, parse_task, remote_inputs
from rlhfuse.profiler.table import SpanTable
from rlhfuse.profiler.transfers import Meeting
from rlhfuse.timeline import Kind, Timeline

_IMPOSSIBLE = 0.05  # a task that begins this share of its time before its input is there
_STEEPEST = 1e-3  # seconds of drift a second; crystals stay below 1e-4
_LEANS = 1.15  # a leaning line must leave this much more room to be believed
_SIGNIFICANT_S = 1e-4
_GOLDEN = (5**0.5 - 1) / 2
Points = list[tuple[float, float]]  # a moment, and the slack of a message then; seconds
Shift = tuple[float, float]  # seconds to add at the timeline's start, and per second after it


@dataclass(frozen=True, slots=True)
class Aligned:
    """A timeline on one clock, the seconds added to each lane (at its start, and per second), and
    what to tell about it."""

    timeline: SpanTable
    offsets_s: dict[str, float]
    drifts: dict[str, float]
    uncertainty_s: float
    notes: tuple[str, ...]


def align(timeline: Timeline | SpanTable) -> Aligned:
    """Move lanes so that causality holds; a timeline in which it holds already stays as it is."""
    table = SpanTable.of(timeline)
    slacks, violations, total = _slacks(table)
    if not violations:
        return Aligned(table, {}, {}, 0.0, ())
    edges = {}
    for a, b in slacks:
        if a < b and (b, a) in slacks:
            shift, room = _line(slacks[a, b], slacks[b, a])
            edges[a, b], edges[b, a] = (shift, room), ((-shift[0], -shift[1]), room)
    shifts, uncertainty = _tree(table.lanes, edges)
    aligned = _moved(table, shifts)
    _, left, _ = _slacks(aligned)
    most = max((abs(offset) for offset, _ in shifts.values()), default=0.0)
    drift = max((abs(slope) for _, slope in shifts.values()), default=0.0)
    leaning = f" and drift by up to {drift * 1e6:.2g} us a second" if drift else ""
    note = (
        f"{violations} of {total} inputs came after their use: the ranks' clocks disagree{leaning}."
        f" Moved by up to {most * 1e3:.3g} ms, known to {uncertainty * 1e3:.2g} ms; {left} remain"
    )
    offsets = {lane: offset for lane, (offset, _) in shifts.items()}
    drifts = {lane: slope for lane, (_, slope) in shifts.items()}
    return Aligned(aligned, offsets, drifts, uncertainty, (note,))


def align_meetings(table: SpanTable, found: Sequence[Meeting]) -> tuple[SpanTable, list[str]]:
    """The same for kernels of messages and collectives, and what to tell about it."""
    ends: dict[tuple[int, int], list[float]] = defaultdict(list)
    apart = 0
    for meeting in found:
        rows = [comm.row for comm in meeting.comms]
        apart += table.start_s[rows].max() > table.end_s[rows].min() + _SIGNIFICANT_S
        for one in rows[1:]:
            a, b = sorted((rows[0], one), key=lambda row: int(table.lane[row]))
            pair = (int(table.lane[a]), int(table.lane[b]))
            ends[pair].append(float(table.end_s[a] - table.end_s[b]))
    edges: dict[tuple[str, str], tuple[Shift, float]] = {}
    for (a, b), differences in ends.items():
        middle = float(np.median(differences))
        spread = float(np.median(np.abs(np.array(differences) - middle)))
        one, other = table.lanes[a], table.lanes[b]
        edges[one, other] = ((middle, 0.0), spread)
        edges[other, one] = ((-middle, 0.0), spread)
    wrong = any(abs(s) > 5 * room + _SIGNIFICANT_S for (s, _), room in edges.values())
    if not (apart and wrong):
        return table, []
    shifts, uncertainty = _tree(table.lanes, edges)
    most = max(abs(offset) for offset, _ in shifts.values())
    return _moved(table, shifts), [
        f"{apart} of {len(found)} messages and collectives were over on one rank before another "
        f"began: the ranks' clocks disagree. Moved by up to {most * 1e3:.3g} ms, so that they end "
        f"together; known to {uncertainty * 1e3:.2g} ms"
    ]


def _slacks(table: SpanTable) -> tuple[dict[tuple[str, str], Points], int, int]:
    """Start minus input's end of every remote input, by (from lane, to lane); how many are
    impossible; how many there are."""
    slacks: dict[tuple[str, str], Points] = defaultdict(list)
    violations = total = 0
    for training in find_rounds(table.spans(table.is_kind((*TRAINING_KINDS, Kind.OPTIMIZER)))):
        made_on = {
            task: lane
            for lane, spans in training.spans.items()
            for span in spans
            if (task := parse_task(span.name)) is not None
        }
        for lane, spans in training.spans.items():
            for span in spans:
                task = parse_task(span.name) if span.kind in TRAINING_KINDS else None
                for needed in remote_inputs(task) if task is not None else ():
                    source = made_on.get(needed, lane)
                    if source == lane:
                        continue
                    slack = span.start_s - training.ready_s[needed]
                    slacks[source, lane].append((span.start_s - table.begin_s, slack))
                    violations += slack < -_IMPOSSIBLE * span.duration_s
                    total += 1
    return slacks, violations, total


def _line(there: Points, back: Points) -> tuple[Shift, float]:
    """What to add to the clock of the lane that messages come `there` to, and how surely.

    What is added must leave no message negative slack: it is at least minus the slack of those
    that come, at most the slack of those that go back.
    """
    (t_low, low), (t_high, high) = np.array(there).T, np.array(back).T
    low = -low

    def room(slope: float) -> tuple[float, float]:
        below, above = (low - slope * t_low).max(), (high - slope * t_high).min()
        return (above - below) / 2, (above + below) / 2

    left, right = -_STEEPEST, _STEEPEST
    for _ in range(60):  # the room is a concave function of the slope
        third = _GOLDEN * (right - left)
        if room(right - third)[0] < room(left + third)[0]:
            left = right - third
        else:
            right = left + third
    steep = (left + right) / 2
    slope = steep if room(steep)[0] > max(_LEANS * room(0.0)[0], 0.0) else 0.0
    margin, offset = room(slope)
    return (float(offset), slope), abs(float(margin))


def _tree(
    lanes: tuple[str, ...], edges: Mapping[tuple[str, str], tuple[Shift, float]]
) -> tuple[dict[str, Shift], float]:
    """What to add per lane, by the tree of the surest pairs from the first lane on."""
    shifts: dict[str, Shift] = {}
    errors: dict[str, float] = {}
    for root in lanes:
        if root in shifts:
            continue
        shifts[root], errors[root] = (0.0, 0.0), 0.0
        while True:
            known = [(edges[a, b][1], a, b) for a, b in edges if a in shifts and b not in shifts]
            if not known:
                break
            error, a, b = min(known)
            (offset, slope), _ = edges[a, b]
            shifts[b] = (shifts[a][0] + offset, shifts[a][1] + slope)
            errors[b] = errors[a] + error
    return shifts, max(errors.values(), default=0.0)


def _moved(table: SpanTable, shifts: Mapping[str, Shift]) -> SpanTable:
    offset, slope = np.array([shifts.get(lane, (0.0, 0.0)) for lane in table.lanes]).T

    def at(times: Floats) -> Floats:
        shift: Floats = offset[table.lane] + slope[table.lane] * (times - table.begin_s)
        return shift

    return table.moved(np.stack([at(table.start_s), at(table.end_s)], axis=1))
