"""Training rounds found in spans, and why a rank waits inside one.

A *round* is what runs under one schedule: one mini-batch of the fused models, or of one model
where they run one after the other. Spans of tasks are named by `Task`'s text form; spans with other
names still count as work, only the peer they waited for is then taken from the operation.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats, Ints
from rlhfuse.profiler.causes import CODE, Cause
from rlhfuse.schedules.ir import Op, Task
from rlhfuse.timeline import Kind, Span

TRAINING_KINDS = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
_BACKWARD = frozenset({Kind.B, Kind.I})


@dataclass(frozen=True, slots=True)
class LaneSteps:
    """One lane's spans of a round by start, as columns [spans]."""

    starts: Floats
    ready_s: Floats  # when the last remote input was computed; -inf without one
    blocked: Ints  # the cause (by number) of waiting for that input
    foreign: Bools  # not named like a task: what it waited for is not known
    free: Bools  # needs nothing of other lanes


@dataclass(frozen=True, slots=True)
class Round:
    """One round: its window over all lanes, its spans per lane, when each result was there."""

    start_s: float
    end_s: float
    spans: dict[str, tuple[Span, ...]]
    lanes: dict[str, LaneSteps]
    ready_s: dict[Task, float]

    def has(self, lane: str) -> bool:
        return lane in self.spans

    def edges(self, lane: str) -> Floats:
        """Moments at which the explanation of the lane's waiting may change."""
        window = np.array([self.start_s, self.end_s])
        own = self.spans.get(lane)
        if own is None:
            return window
        ready = self.lanes[lane].ready_s
        inner = [own[0].start_s, max(span.end_s for span in own)]
        return np.concatenate([window, inner, ready[np.isfinite(ready)]])


def find_rounds(spans: Sequence[Span]) -> tuple[Round, ...]:
    """Rounds by time.

    Tasks belong together when they have the same ``args["round"]``; without it, when they lie
    between the same two optimizer steps of their lane and their pipelines ran at the same time.
    """
    steps: dict[str, list[float]] = {}
    for span in spans:
        if span.kind is Kind.OPTIMIZER:
            steps.setdefault(span.lane, []).append(span.start_s)
    for moments in steps.values():
        moments.sort()
    groups: dict[tuple[str, int, str], list[Span]] = {}
    for span in spans:
        if span.kind in TRAINING_KINDS:
            groups.setdefault(_group(span, steps), []).append(span)
    return tuple(_round(members) for members in _joined(list(groups.values())))


def parse_task(name: str) -> Task | None:
    """The task that a span's name says, or None for names of other makers."""
    try:
        return Task.parse(name)
    except ValueError:
        return None


def _group(span: Span, steps: dict[str, list[float]]) -> tuple[str, int, str]:
    if "round" in span.args:
        return (f"round {span.args['round']}", 0, "")
    before = bisect_left(steps.get(span.lane, []), span.end_s)
    return ("", before, span.name.partition(":")[0] if ":" in span.name else "")


def _joined(groups: list[list[Span]]) -> list[list[Span]]:
    """Groups that overlap for more than a hundredth of the shorter one, as one.

    Those that name their round stay apart: a fast rank may begin a round before a slow one ends
    the last.
    """
    groups.sort(key=lambda group: min(span.start_s for span in group))
    joined: list[list[Span]] = []
    for group in groups:
        if joined and "round" not in group[0].args and _overlap(joined[-1], group):
            joined[-1] = joined[-1] + group
        else:
            joined.append(group)
    return joined


def _overlap(one: Sequence[Span], other: Sequence[Span]) -> bool:
    (a, b), (c, d) = _extent(one), _extent(other)
    return min(b, d) - max(a, c) > 0.01 * min(b - a, d - c)


def _extent(spans: Sequence[Span]) -> tuple[float, float]:
    return min(span.start_s for span in spans), max(span.end_s for span in spans)


def _round(members: Sequence[Span]) -> Round:
    start_s, end_s = _extent(members)
    lanes: dict[str, list[Span]] = {}
    tasks: dict[str, list[Task | None]] = {}
    ready: dict[Task, float] = {}
    for span in sorted(members, key=lambda span: (span.start_s, span.end_s)):
        lanes.setdefault(span.lane, []).append(span)
        task = parse_task(span.name)
        tasks.setdefault(span.lane, []).append(task)
        if task is not None:
            ready[task] = max(ready.get(task, span.end_s), span.end_s)
    return Round(
        start_s=start_s,
        end_s=end_s,
        spans={lane: tuple(own) for lane, own in lanes.items()},
        lanes={lane: _steps(own, tasks[lane], ready) for lane, own in lanes.items()},
        ready_s=ready,
    )


def _steps(
    spans: Sequence[Span], tasks: Sequence[Task | None], ready: Mapping[Task, float]
) -> LaneSteps:
    upstream, downstream = CODE[Cause.UPSTREAM], CODE[Cause.DOWNSTREAM]
    moments = [
        max((ready[x] for x in remote_inputs(task) if x in ready), default=-np.inf)
        if task is not None
        else -np.inf
        for task in tasks
    ]
    return LaneSteps(
        starts=np.array([span.start_s for span in spans]),
        ready_s=np.array(moments),
        blocked=np.array([downstream if s.kind in _BACKWARD else upstream for s in spans]),
        foreign=np.array([task is None for task in tasks]),
        free=np.array([span.kind is Kind.W for span in spans]),
    )


def remote_inputs(task: Task) -> tuple[Task, ...]:
    """Tasks of other pipeline stages whose result `task` needs (B or I, whichever ran)."""
    match task.op:
        case Op.F:
            return (_at(task, Op.F, task.pp_stage - 1),)
        case Op.B | Op.I:
            following = task.pp_stage + 1
            return (_at(task, Op.B, following), _at(task, Op.I, following))
        case Op.W:
            return ()


def _at(task: Task, op: Op, pp_stage: int) -> Task:
    return Task(task.pipeline, op, pp_stage, task.microbatch)
