"""What makes a schedule a legal answer to its problem, in plain Python: the reference.

`timing` computes the same times compiled; tests hold the two together.
"""

from collections.abc import Iterator, Mapping

from rlhfuse.schedules.ir import REL_TOL, Op, Problem, Schedule, Task


def check_schedule(schedule: Schedule) -> None:
    """`Schedule.validate`, check by check.

    Raises:
        ValueError: what is wrong, and the schedule with the place marked.
    """
    _check_places(schedule)
    _check_complete(schedule)
    _check_order(schedule)
    _check_memory(schedule)
    _check_deadlines(schedule, completion_times(schedule))


def completion_times(schedule: Schedule) -> dict[Task, float]:
    """End of every task when each rank runs its row as early as it can: the plain reference.

    `timing.simulate` computes the same, compiled.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    problem = schedule.problem
    ends: dict[Task, float] = {}
    arrived: dict[tuple[str, bool, int, int], float] = {}  # (pipeline, is F, stage, micro-batch)
    at = [0] * problem.num_ranks
    free = [0.0] * problem.num_ranks
    moved = True
    while moved:
        moved = False
        for rank, row in enumerate(schedule.rows):
            while at[rank] < len(row):
                task = row[at[rank]]
                ready = _ready(problem, task, rank, arrived)
                if ready is None:
                    break
                pipe = problem.pipeline(task.pipeline)
                free[rank] = max(free[rank], ready) + pipe.duration(
                    task.op, task.pp_stage, task.microbatch
                )
                ends[task] = free[rank]
                if task.op is not Op.W:
                    key = (task.pipeline, task.op is Op.F, task.pp_stage, task.microbatch)
                    arrived[key] = free[rank]
                at[rank] += 1
                moved = True
    for rank, row in enumerate(schedule.rows):
        if at[rank] < len(row):
            what = (
                f"rank {rank} never starts {row[at[rank]]}: tasks wait for each other in a circle"
            )
            raise ValueError(f"{what}\n{schedule.marked(rank, at[rank])}")
    return ends


def _ready(
    problem: Problem, task: Task, rank: int, arrived: Mapping[tuple[str, bool, int, int], float]
) -> float | None:
    """When the input of `task` is on its rank, or None while it does not exist."""
    pipe = problem.pipeline(task.pipeline)
    name, stage, mb = task.pipeline, task.pp_stage, task.microbatch
    if task.op is Op.W:
        return arrived.get((name, False, stage, mb))
    if task.op is Op.F:
        if stage == 0:
            return pipe.release
        source = (name, True, stage - 1, mb)
    elif stage == pipe.num_stages - 1:
        source = (name, True, stage, mb)
    else:
        source = (name, False, stage + 1, mb)
    end = arrived.get(source)
    return None if end is None else end + problem.latency(pipe.stages[source[2]], rank)


def peak_memory(schedule: Schedule) -> tuple[float, ...]:
    """Highest memory of each rank. It depends on the order of its row, not on times."""
    return tuple(
        max((level for level in levels), default=0.0) for levels in memory_levels(schedule)
    )


def memory_levels(schedule: Schedule) -> Iterator[list[float]]:
    """Per rank and task, the highest memory while the task runs or just after."""
    for row in schedule.rows:
        held, levels = 0.0, []
        for task in row:
            pipe = schedule.problem.pipeline(task.pipeline)
            before, after = pipe.memory_change(task.op, task.pp_stage, task.microbatch)
            levels.append(max(held + before, held + before + after))
            held += before + after
        yield levels


def _check_places(schedule: Schedule) -> None:
    problem = schedule.problem
    pipes = {pipe.name: pipe for pipe in problem.pipelines}
    seen: set[Task] = set()
    for rank, index, task in schedule.tasks():
        pipe = pipes.get(task.pipeline)
        problem_text = None
        if pipe is None:
            problem_text = f"names no pipeline of the problem (there are {', '.join(pipes)})"
        elif not 0 <= task.pp_stage < pipe.num_stages:
            problem_text = f"has no such stage: the pipeline has {pipe.num_stages}"
        elif not 0 <= task.microbatch < pipe.num_microbatches:
            problem_text = f"has no such micro-batch: the pipeline has {pipe.num_microbatches}"
        elif pipe.stages[task.pp_stage] != rank:
            problem_text = f"stands on rank {rank}, its stage on rank {pipe.stages[task.pp_stage]}"
        elif pipe.forward_only and task.op is not Op.F:
            problem_text = "is a backward task of a forward-only pipeline"
        elif task in seen:
            problem_text = "appears twice"
        if problem_text is not None:
            raise ValueError(f"{task} {problem_text}\n{schedule.marked(rank, index)}")
        seen.add(task)


def _check_complete(schedule: Schedule) -> None:
    there = {task for row in schedule.rows for task in row}
    for pipe in schedule.problem.pipelines:
        for stage, rank in enumerate(pipe.stages):
            for mb in range(pipe.num_microbatches):
                has = "".join(op for op in Op if Task(pipe.name, op, stage, mb) in there)
                if has not in (("F",) if pipe.forward_only else ("FB", "FIW")):
                    want = "F" if pipe.forward_only else "F and either B or both I and W"
                    raise ValueError(
                        f"{pipe.name} stage {stage} micro-batch {mb} needs {want}, has "
                        f"{has or 'nothing'}\n{schedule.marked(rank, len(schedule.rows[rank]))}"
                    )


def _check_order(schedule: Schedule) -> None:
    """F in order; B and I together; B and W together; on one stage F before B, I before W."""
    for rank, row in enumerate(schedule.rows):
        count: dict[tuple[str, int], list[int]] = {}
        for index, task in enumerate(row):
            done = count.setdefault((task.pipeline, task.pp_stage), [0, 0, 0])  # F, B or I, B or W
            marks = {Op.F: (0,), Op.B: (1, 2), Op.I: (1,), Op.W: (2,)}[task.op]
            late = next((k for k in marks if done[k] != task.microbatch), None)
            if late is not None:
                what = ("F", "B or I", "B or W")[late]
                raise ValueError(
                    f"{task} is out of order: micro-batch {done[late]} is the next {what} of its "
                    f"stage\n{schedule.marked(rank, index)}"
                )
            before = {Op.F: -1, Op.B: 0, Op.I: 0, Op.W: 1}[task.op]
            if before >= 0 and done[before] <= task.microbatch:
                what = "forward" if before == 0 else "input gradient"
                raise ValueError(f"{task} comes before its {what}\n{schedule.marked(rank, index)}")
            for k in marks:
                done[k] += 1


def _check_memory(schedule: Schedule) -> None:
    cap = schedule.problem.memory_cap
    if cap is None:
        return
    for rank, levels in enumerate(memory_levels(schedule)):
        for index, level in enumerate(levels):
            if level > cap * (1 + REL_TOL):
                task = schedule.rows[rank][index]
                raise ValueError(
                    f"rank {rank} holds {level:g} at {task}, over the cap of {cap:g}\n"
                    f"{schedule.marked(rank, index)}"
                )


def _check_deadlines(schedule: Schedule, ends: Mapping[Task, float]) -> None:
    for rank, index, task in schedule.tasks():
        deadline = schedule.problem.pipeline(task.pipeline).deadline
        if deadline is not None and ends[task] > deadline * (1 + REL_TOL):
            raise ValueError(
                f"{task} ends at {ends[task]:g}, after its pipeline's deadline {deadline:g}\n"
                f"{schedule.marked(rank, index)}"
            )
