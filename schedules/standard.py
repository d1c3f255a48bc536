"""Standard schedules, as generators that read like their papers.

Pipelines are put one after the other in *groups*: a pipeline joins the first group (in file order)
with whose members it shares no rank, and groups follow each other. Within a group each pipeline
runs by the named policy. Nothing here fuses anything: these are the baselines.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping

from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.dispatch import dispatch_pipeline
from rlhfuse.schedules.ir import REL_TOL, Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.timing import check_channels, makespan

StageOrder = Callable[[Problem, Pipeline, int], Iterator[Task]]
Rows = Mapping[int, Iterable[Task]]  # what one pipeline runs on each of its ranks


def serial(problem: Problem) -> Schedule:
    """1F1B per group of pipelines that share no rank, one group after the other.

    Where the memory cap allows less than 1F1B holds, fewer micro-batches are in flight.

    Raises:
        ValueError: the cap does not even hold one micro-batch.
    """
    return _in_groups(problem, one_f_one_b_stage)


def one_f_one_b(problem: Problem) -> Schedule:
    """1F1B (PipeDream-Flush, arXiv 2006.09503): bubble (p-1)(F+B), p - s in flight at stage s."""
    return _in_groups(problem, one_f_one_b_stage)


def gpipe(problem: Problem) -> Schedule:
    """GPipe (arXiv 1811.06965): all forwards, then all backwards; bubble (p-1)(F+B).

    Raises:
        ValueError: all micro-batches in flight exceed the memory cap.
    """
    return checked(_in_groups(problem, _gpipe_stage), "GPipe")


def zb_h1(problem: Problem) -> Schedule:
    """ZB-H1 (arXiv 2401.10241): 1F1B with the weight gradients moved into the bubbles.

    Bubble (p-1)(F+I-W) per pipeline where F = I = W, memory as 1F1B: stage s does its first W once
    it is s backwards ahead, and what is left at the end. Pipelines without a weight part run 1F1B.
    """
    return _in_groups(problem, _zb_h1_stage)


def _zb_h1_stage(problem: Problem, pipe: Pipeline, stage: int) -> Iterator[Task]:
    if not any(pipe.weight):
        yield from one_f_one_b_stage(problem, pipe, stage)
        return
    m, limit = pipe.num_microbatches, in_flight_limits(problem, pipe)
    warm_up = min(m, limit[stage])
    lag = _weights_that_wait(problem, pipe, stage, warm_up, limit[0] - limit[stage])
    for mb in range(warm_up):
        yield Task(pipe.name, Op.F, stage, mb)
    for mb in range(m):
        yield Task(pipe.name, Op.I, stage, mb)
        if mb >= lag:
            yield Task(pipe.name, Op.W, stage, mb - lag)
        if mb + warm_up < m:
            yield Task(pipe.name, Op.F, stage, mb + warm_up)
    for mb in range(max(0, m - lag), m):
        yield Task(pipe.name, Op.W, stage, mb)


def _weights_that_wait(
    problem: Problem, pipe: Pipeline, stage: int, warm_up: int, most: int
) -> int:
    """Weight gradients that a stage may put off: what the first stage holds more, within the cap.

    The stage is fullest with `warm_up` forwards beside them, or just after one more I.
    """
    heaviest = max(pipe.microbatch_weights)
    whole = pipe.activation[stage] * heaviest
    kept = pipe.activation_after_input[stage] * heaviest
    if problem.memory_cap is None or kept <= 0:
        return most
    room = problem.memory_cap * (1 + REL_TOL) - (warm_up - 1) * whole
    return max(0, min(most, int((room - whole) / kept), int(room / kept) - 1))


def serial_makespan(problem: Problem) -> float:
    """1F1B time of each group alone, added: a barrier stands between groups."""
    total = 0.0
    for group in groups(problem):
        alone = Problem(problem.num_ranks, group, problem.memory_cap, problem.link_latency)
        total += makespan(serial(alone))
    return total


def groups(problem: Problem) -> list[tuple[Pipeline, ...]]:
    """Pipelines that can run side by side, in file order."""
    found: list[list[Pipeline]] = []
    for pipe in problem.pipelines:
        ranks = set(pipe.stages)
        home = next((g for g in found if all(ranks.isdisjoint(p.stages) for p in g)), None)
        if home is None:
            found.append([pipe])
        else:
            home.append(pipe)
    return [tuple(group) for group in found]


def in_flight_limits(problem: Problem, pipe: Pipeline) -> tuple[int, ...]:
    """Micro-batches that 1F1B holds at each stage, fewer where the memory cap says so.

    Never more than at the stage before, or both stages would wait for each other.

    Raises:
        ValueError: the cap does not even hold one micro-batch.
    """
    limits: list[int] = []
    share = _shares(pipe)
    for stage, rank in enumerate(pipe.stages):
        limit = pipe.num_stages - stage
        held = share[rank]
        if problem.memory_cap is not None and held > 0:
            limit = min(limit, int(problem.memory_cap * (1 + REL_TOL) / held))
        limits.append(min([limit, *limits[-1:]]))
    if min(limits) < 1:
        least = max(max(_shares(other).values()) for other in problem.pipelines)
        raise ValueError(
            f"memory_cap {problem.memory_cap:g} does not hold one micro-batch of pipeline "
            f"{pipe.name!r}; for all pipelines the least cap that does is {least:.9g}"
        )
    return tuple(limits)


def _shares(pipe: Pipeline) -> dict[int, float]:
    """Memory of the heaviest micro-batch on each rank with all the pipeline's stages there."""
    heaviest = max(pipe.microbatch_weights)
    return {rank: heaviest * _least_held(pipe, rank) for rank in pipe.stages}


def _least_held(pipe: Pipeline, rank: int) -> float:
    """Memory of one micro-batch of weight 1 on a rank with all the pipeline's stages there."""
    held = [
        max(
            pipe.activation[stage], 0.0 if pipe.forward_only else pipe.activation_after_input[stage]
        )
        for stage, home in enumerate(pipe.stages)
        if home == rank
    ]
    return max(held) if pipe.forward_only else sum(held)


def one_f_one_b_stage(problem: Problem, pipe: Pipeline, stage: int) -> Iterator[Task]:
    """One stage: warm-up forwards, one forward one backward, cool-down backwards."""
    m = pipe.num_microbatches
    if pipe.forward_only:
        yield from (Task(pipe.name, Op.F, stage, mb) for mb in range(m))
        return
    warm_up = min(m, in_flight_limits(problem, pipe)[stage])
    for mb in range(warm_up):
        yield Task(pipe.name, Op.F, stage, mb)
    for mb in range(m):
        yield Task(pipe.name, Op.B, stage, mb)
        if mb + warm_up < m:
            yield Task(pipe.name, Op.F, stage, mb + warm_up)


def _gpipe_stage(problem: Problem, pipe: Pipeline, stage: int) -> Iterator[Task]:
    for mb in range(pipe.num_microbatches):
        yield Task(pipe.name, Op.F, stage, mb)
    for mb in range(0 if pipe.forward_only else pipe.num_microbatches):
        yield Task(pipe.name, Op.B, stage, mb)


def _in_groups(problem: Problem, stage_order: StageOrder) -> Schedule:
    def rows(pipe: Pipeline) -> Rows:
        if len(set(pipe.stages)) == pipe.num_stages:
            return {r: stage_order(problem, pipe, s) for s, r in enumerate(pipe.stages)}
        limits = in_flight_limits(problem, pipe)
        alone = Problem(problem.num_ranks, (pipe,), None, problem.link_latency)
        return dict(enumerate(dispatch_pipeline(alone, limits).rows))

    return in_groups(problem, rows)


def in_groups(problem: Problem, rows_of: Callable[[Pipeline], Rows]) -> Schedule:
    """Group after group; within a group each pipeline runs the rows that `rows_of` gives it."""
    rows: list[list[Task]] = [[] for _ in range(problem.num_ranks)]
    for group in groups(problem):
        for pipe in group:
            for rank, more in rows_of(pipe).items():
                rows[rank].extend(more)
    return Schedule(problem, tuple(tuple(row) for row in rows))


def plain_rows(pipe: Pipeline) -> Rows:
    """A forward-only pipeline: each rank takes the micro-batches as they come."""
    rows: dict[int, list[Task]] = {rank: [] for rank in pipe.stages}
    for mb in range(pipe.num_microbatches):
        for stage, rank in enumerate(pipe.stages):
            rows[rank].append(Task(pipe.name, Op.F, stage, mb))
    return rows


def checked(schedule: Schedule, policy: str) -> Schedule:
    """The schedule itself, if it keeps its problem's memory cap and can be executed.

    Raises:
        ValueError: it does not; the policy, why, and the way out.
    """
    need, cap = max(peak_memory(schedule)), schedule.problem.memory_cap
    if cap is not None and need > cap * (1 + REL_TOL):
        raise ValueError(
            f"{policy} holds {need:.6g} on a rank, over the memory cap of {cap:g}; raise the cap "
            "or take the policy fused"
        )
    try:
        check_channels(schedule)
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{policy} cannot be executed with these stage maps ({reason}); take the policy fused"
        ) from error
    return schedule
