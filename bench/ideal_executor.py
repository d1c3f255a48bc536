"""What a schedule would take if nothing but its tasks took time, and where a run lost what it took
beyond that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhfuse.schedules.ir import Op, Schedule, Task
from rlhfuse.timeline import Kind, Span

TASKS = (Kind.F, Kind.B, Kind.I, Kind.W)


def replay(schedule: Schedule, spans: Sequence[Span]) -> float:
    """Makespan of a schedule whose tasks take exactly as long as they did in one run, with free
    messages: what the executor itself loses is the measured time beyond this."""
    duration = {span.name: span.duration_s for span in spans if span.kind in TASKS}
    ends: dict[Task, float] = {}
    rows = [list(row) for row in schedule.rows]
    free = [0.0] * len(rows)
    while any(rows):
        for rank, row in enumerate(rows):
            while row:
                source = sources(schedule, row[0])
                if source and not any(task in ends for task in source):
                    break
                ready = max((ends[task] for task in source if task in ends), default=0.0)
                task = row.pop(0)
                free[rank] = max(free[rank], ready) + duration[str(task)]
                ends[task] = free[rank]
    return max(free)


@dataclass(frozen=True, slots=True)
class Lost:
    """Seconds beyond the asked ones on a run's critical path: the tasks and waits that its last
    task's end hung on, each on the one that ended last before it."""

    in_tasks: float
    """Tasks that lasted longer than asked: less than 0 where they made up for others."""
    between: float
    """From a task's end to the next one's start on its rank, which had its message already."""
    for_messages: float
    """From a task's end to the start of a task of another rank that waited for it."""


def lost(schedule: Schedule, spans: Sequence[Span], asked_s: Mapping[Op, float]) -> Lost:
    """Where a run of `schedule` lost its time. `asked_s`: what each kind of task was to last."""
    run = {span.name: span for span in spans if span.kind in TASKS}
    before: dict[str, list[Span]] = {}
    for row in schedule.rows:
        for index, task in enumerate(row):
            names = [str(source) for source in sources(schedule, task)]
            names += [str(row[index - 1])] if index else []
            before[str(task)] = [run[name] for name in names if name in run]
    at = max(run.values(), key=lambda span: span.end_s)
    in_tasks = between = for_messages = 0.0
    while True:
        in_tasks += at.duration_s - asked_s[Op(at.kind.value)]
        earlier = max(before[at.name], key=lambda span: span.end_s, default=None)
        if earlier is None:
            return Lost(in_tasks, between, for_messages)
        if earlier.lane == at.lane:
            between += at.start_s - earlier.end_s
        else:
            for_messages += at.start_s - earlier.end_s
        at = earlier


def sources(schedule: Schedule, task: Task) -> tuple[Task, ...]:
    """The tasks one of which makes the input of `task`; none where it needs none."""
    last = schedule.problem.pipeline(task.pipeline).num_stages - 1
    if task.op is Op.F:
        return (replace(task, pp_stage=task.pp_stage - 1),) if task.pp_stage else ()
    if task.op is Op.W or task.pp_stage == last:
        return (replace(task, op=Op.I if task.op is Op.W else Op.F),)
    above = replace(task, pp_stage=task.pp_stage + 1)
    return replace(above, op=Op.B), replace(above, op=Op.I)
