"""Ranks on one clock: no task may begin before its input, computed on another rank, was there.

Where a rank stood idle until its input came, the task's start is the input's end plus the link's
latency: such messages, in both directions between two ranks, tell their clocks' offset, drift and
the latency (taken as equal both ways) by least squares, whatever does not fit being dropped. All
messages bound the offset: half the room that they leave is the uncertainty; where too few ranks
waited, the middle of that room is the estimate. Communication kernels, which last until all
partners are through, end together: there the median difference of ends is the estimate.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.profiler.arrays import Floats
from rlhfuse.profiler.joint_clocks import (
    LOW,
    ROUNDS,
    USUAL_DRIFT,
    Points,
    Shift,
    expectile,
    refined,
)
from rlhfuse.profiler.rounds import TRAINING_KINDS, find_rounds, parse_task, remote_inputs
from rlhfuse.profiler.table import SpanTable
from rlhfuse.profiler.transfers import Meeting, meetings, named_collectives
from rlhfuse.timeline import Kind, Timeline

_IMPOSSIBLE = 0.05  # a task that begins this share of its time before its input is there
_WAITED = 0.02  # of a task: idle for longer than this, it waited for its input
_FEWEST = 3  # messages that were waited for, each way
_SIGNIFICANT_S = 1e-4


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
    shifts, uncertainty, roots = _tree(table.lanes, edges)
    aligned = _moved(table, shifts)
    # Pipelines that exchange no messages, such as data-parallel replicas, meet in collectives.
    pairs, _ = meetings(named_collectives(aligned))
    aligned, between = _together(aligned, pairs, roots)
    shifts = {x: (s + between.get(roots[x], 0.0), slope) for x, (s, slope) in shifts.items()}
    if pairs and len(set(roots.values())) > 1:
        more = refined(aligned, _slacks(aligned)[0], pairs)
        aligned = _moved(aligned, more)
        shifts = {x: (s + more[x][0], slope + more[x][1]) for x, (s, slope) in shifts.items()}
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
    apart = sum(
        table.start_s[rows].max() > table.end_s[rows].min() + _SIGNIFICANT_S
        for rows in ([comm.row for comm in meeting.comms] for meeting in found)
    )
    if not apart:
        return table, []
    aligned, shifts = _together(table, found, {lane: lane for lane in table.lanes})
    most = max((abs(offset) for offset in shifts.values()), default=0.0)
    if most <= _SIGNIFICANT_S:
        return table, []
    return aligned, [
        f"{apart} of {len(found)} messages and collectives were over on one rank before another "
        f"began: the ranks' clocks disagree. Moved by up to {most * 1e3:.3g} ms, so that they end "
        "together"
    ]


def _together(
    table: SpanTable, found: Sequence[Meeting], group_of: Mapping[str, str]
) -> tuple[SpanTable, dict[str, float]]:
    """Move groups of lanes so that the kernels of a meeting end together; what each was moved by.

    Where medians of ends differ by less than they scatter, nothing is moved.
    """
    ends: dict[tuple[str, str], list[float]] = defaultdict(list)
    for meeting in found:
        first, *others = (comm.row for comm in meeting.comms)
        for other in others:
            a, b = (group_of[table.lanes[table.lane[row]]] for row in (first, other))
            if a != b:
                difference = float(table.end_s[first] - table.end_s[other])
                ends[a, b].append(difference)
                ends[b, a].append(-difference)
    edges: dict[tuple[str, str], tuple[Shift, float]] = {}
    for pair, differences in ends.items():
        middle = float(np.median(differences))
        scatter = float(np.median(np.abs(np.array(differences) - middle)))
        edges[pair] = ((middle if abs(middle) > 3 * scatter else 0.0, 0.0), scatter)
    shifts, _, _ = _tree(tuple(dict.fromkeys(group_of.values())), edges)
    moved = {lane: shifts[group] for lane, group in group_of.items()}
    return _moved(table, moved), {group: offset for group, (offset, _) in shifts.items()}


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
            free = np.inf
            for span in spans:
                waited = span.start_s - free > _WAITED * span.duration_s
                free = span.end_s
                task = parse_task(span.name) if span.kind in TRAINING_KINDS else None
                for needed in remote_inputs(task) if task is not None else ():
                    source = made_on.get(needed, lane)
                    if source == lane:
                        continue
                    slack = span.start_s - training.ready_s[needed]
                    slacks[source, lane].append((span.start_s - table.begin_s, slack, waited))
                    violations += slack < -_IMPOSSIBLE * span.duration_s
                    total += 1
    return slacks, violations, total


def _line(there: Points, back: Points) -> tuple[Shift, float]:
    """What to add to the clock of the lane that messages come `there` to, and how surely.

    What is added must leave no message negative slack: it is at least minus the slack of those
    that come, at most the slack of those that go back.
    """
    (t_low, low, waited_low), (t_high, high, waited_high) = np.array(there).T, np.array(back).T

    def room(slope: float) -> tuple[float, float]:
        below, above = (-low - slope * t_low).max(), (high - slope * t_high).min()
        return (above - below) / 2, (above + below) / 2

    margin, offset = room(0.0)
    tight = (waited_low > 0, waited_high > 0)
    if min(tight[0].sum(), tight[1].sum()) < _FEWEST:
        return (float(offset), 0.0), abs(float(margin))
    shift = _fitted(
        (offset, max(margin, 0.0)),
        np.concatenate([t_low[tight[0]], t_high[tight[1]]]),
        np.concatenate([low[tight[0]], high[tight[1]]]),
        np.repeat([-1.0, 1.0], [int(tight[0].sum()), int(tight[1].sum())]),
    )
    return shift, abs(float(room(shift[1])[0]))


def _fitted(start: tuple[float, float], times: Floats, slack: Floats, sign: Floats) -> Shift:
    """Offset and drift from slack = latency + sign * (offset + drift * time), robustly.

    What came late for a reason of its own lies above that: the fit begins at the lower edges,
    `start` being the offset and the latency there, and keeps what is near.
    """
    found = np.array([start[0], 0.0, start[1]])
    reach = max(start[1], 1e-6) + USUAL_DRIFT * float(np.ptp(times))
    kept = np.ones(len(times), dtype=np.bool_)
    scale = reach
    for _ in range(6):
        off = np.abs(slack - found[2] - sign * (found[0] + found[1] * times))
        kept = off <= max(reach, float(off.min()))
        scale = 1.5 * float(np.median(off[kept])) + 1e-9
        found = _least(times[kept], slack[kept], sign[kept], start[1], scale, None)
        reach = 3 * scale
    for _ in range(ROUNDS):
        late = slack[kept] > found[2] + sign[kept] * (found[0] + found[1] * times[kept])
        weight = expectile(late, LOW)
        found = _least(times[kept], slack[kept], sign[kept], start[1], scale, weight)
    return (float(found[0]), float(found[1]))


def _least(
    times: Floats, slack: Floats, sign: Floats, latency: float, scale: float, weight: Floats | None
) -> Floats:
    """Offset, drift and latency by weighted least squares."""
    root = np.sqrt(weight) if weight is not None else np.ones(len(times))
    rows = np.stack([sign, sign * times, np.ones(len(times))], axis=1) * root[:, None]
    # Drift is small unless the messages say otherwise, louder than they scatter; and without
    # messages of both ways, nothing tells offset and latency apart.
    prior = np.diag([0.0, scale / USUAL_DRIFT, scale / max(latency, 1e-6)])
    wanted = np.append(slack * root, prior @ np.array([0.0, 0.0, latency]))
    found: Floats = np.linalg.lstsq(np.concatenate([rows, prior]), wanted, rcond=None)[0]
    return found


def _tree(
    lanes: tuple[str, ...], edges: Mapping[tuple[str, str], tuple[Shift, float]]
) -> tuple[dict[str, Shift], float, dict[str, str]]:
    """What to add per lane, by the tree of the surest pairs from the first lane on; the largest
    uncertainty; and the first lane of each lane's tree."""
    roots: dict[str, str] = {}
    shifts: dict[str, Shift] = {}
    errors: dict[str, float] = {}
    for root in lanes:
        if root in shifts:
            continue
        shifts[root], errors[root], roots[root] = (0.0, 0.0), 0.0, root
        while True:
            known = [(edges[a, b][1], a, b) for a, b in edges if a in shifts and b not in shifts]
            if not known:
                break
            error, a, b = min(known)
            (offset, slope), _ = edges[a, b]
            shifts[b] = (shifts[a][0] + offset, shifts[a][1] + slope)
            errors[b], roots[b] = errors[a] + error, root
    return shifts, max(errors.values(), default=0.0), roots


def _moved(table: SpanTable, shifts: Mapping[str, Shift]) -> SpanTable:
    offset, slope = np.array([shifts.get(lane, (0.0, 0.0)) for lane in table.lanes]).T

    def at(times: Floats) -> Floats:
        shift: Floats = offset[table.lane] + slope[table.lane] * (times - table.begin_s)
        return shift

    return table.moved(np.stack([at(table.start_s), at(table.end_s)], axis=1))
