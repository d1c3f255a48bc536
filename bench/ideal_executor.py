"""What a schedule would take if nothing but its tasks took time."""

from collections.abc import Sequence
from dataclasses import replace

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


def sources(schedule: Schedule, task: Task) -> tuple[Task, ...]:
    """The tasks one of which makes the input of `task`; none where it needs none."""
    last = schedule.problem.pipeline(task.pipeline).num_stages - 1
    if task.op is Op.F:
        return (replace(task, pp_stage=task.pp_stage - 1),) if task.pp_stage else ()
    if task.op is Op.W or task.pp_stage == last:
        return (replace(task, op=Op.I if task.op is Op.W else Op.F),)
    above = replace(task, pp_stage=task.pp_stage + 1)
    return replace(above, op=Op.B), replace(above, op=Op.I)
