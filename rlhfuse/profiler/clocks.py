"""Ranks on one clock: no task may begin before its input, computed on another rank, was there.

Between two ranks that send to each other, the least slack in each direction bounds the difference
of their clocks from both sides; the middle is the estimate (exact where messages take equally long
both ways), half the distance its uncertainty.
"""

from dataclasses import dataclass

from rlhfuse.profiler.rounds import TRAINING_KINDS, find_rounds, parse_task, remote_inputs
from rlhfuse.timeline import Timeline

_IMPOSSIBLE = 0.05  # a task that begins this share of its time before its input is there


@dataclass(frozen=True, slots=True)
class Aligned:
    """A timeline on one clock, the seconds added to each lane, and what to tell about it."""

    timeline: Timeline
    offsets_s: dict[str, float]
    uncertainty_s: float
    notes: tuple[str, ...]


def align(timeline: Timeline) -> Aligned:
    """Move lanes so that causality holds; a timeline in which it holds already stays as it is."""
    slack, violations, total = _slacks(timeline)
    if not violations:
        return Aligned(timeline, {}, 0.0, ())
    offsets, uncertainty = _offsets(timeline.lanes, slack)
    moved = [
        Timeline(timeline.of_lane(lane)).shifted(offsets.get(lane, 0.0)) for lane in timeline.lanes
    ]
    aligned = Timeline.merged(moved)
    _, left, _ = _slacks(aligned)
    most = max((abs(offset) for offset in offsets.values()), default=0.0)
    note = (
        f"{violations} of {total} inputs came after their use: the ranks' clocks disagree. Moved "
        f"by up to {most * 1e3:.3g} ms, known to {uncertainty * 1e3:.2g} ms; {left} remain"
    )
    return Aligned(aligned, offsets, uncertainty, (note,))


def _slacks(timeline: Timeline) -> tuple[dict[tuple[str, str], float], int, int]:
    """Least start minus input's end per (from lane, to lane); violations; inputs seen."""
    least: dict[tuple[str, str], float] = {}
    violations = total = 0
    for training in find_rounds(timeline.spans):
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
                    pair = (source, lane)
                    least[pair] = min(slack, least.get(pair, slack))
                    violations += slack < -_IMPOSSIBLE * span.duration_s
                    total += 1
    return least, violations, total


def _offsets(
    lanes: tuple[str, ...], slack: dict[tuple[str, str], float]
) -> tuple[dict[str, float], float]:
    """Seconds to add per lane, by the tree of the surest pairs from the first lane on."""
    sure = {
        (a, b): ((slack[b, a] - there) / 2, abs(there + slack[b, a]) / 2)
        for (a, b), there in slack.items()
        if (b, a) in slack
    }
    offsets: dict[str, float] = {}
    errors: dict[str, float] = {}
    for root in lanes:
        if root in offsets:
            continue
        offsets[root], errors[root] = 0.0, 0.0
        while True:
            edges = [(sure[a, b][1], a, b) for a, b in sure if a in offsets and b not in offsets]
            if not edges:
                break
            error, a, b = min(edges)
            offsets[b] = offsets[a] + sure[a, b][0]
            errors[b] = errors[a] + error
    return offsets, max(errors.values(), default=0.0)
