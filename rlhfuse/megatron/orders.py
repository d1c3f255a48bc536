"""Schedules for Megatron's pipelines: which there are, how one is named, whether one fits."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from rlhfuse.schedules.formats import from_torch_csv, schedule_from_json
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import one_f_one_b, zb_h1
from rlhfuse.schedules.timing import check_channels

Policy = Callable[[Problem], Schedule]
"""Makes a schedule. Called on every rank alike: it must not depend on clocks or chance."""
Choice = Policy | Schedule | Path | str
"""A policy, a schedule, a file (``.json`` of ``rlhfuse schedule -o``, or torch's ``.csv``), or one
of the names ``1f1b``, ``zero-bubble``, ``fuse``, ``fuse-split``."""

PerStage = float | tuple[float, ...]
SEARCH_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Costs:
    """What one micro-batch costs on each stage, in any one unit of time and of memory."""

    forward: PerStage = 1.0
    backward: PerStage = 2.0
    weight: PerStage = 1.0
    activation: PerStage = 1.0


@dataclass(frozen=True, slots=True)
class Shape:
    """One model's pipeline as a schedule sees it."""

    rows: tuple[int, ...]
    """Row of the schedule of each pipeline rank, in stage order."""
    chunks: int
    num_microbatches: int
    forward_only: bool

    @property
    def stages(self) -> tuple[int, ...]:
        return self.rows * self.chunks


def policy_named(name: str) -> Policy:
    """The policy that `name` means.

    Raises:
        ValueError: there is none.
    """
    policies: dict[str, Policy] = {
        "1f1b": default_order,
        "zero-bubble": zb_h1,
        "fuse": partial(fuse, iterations=SEARCH_ROUNDS),
        "fuse-split": partial(fuse, iterations=SEARCH_ROUNDS, split_weight=True),
    }
    if name not in policies:
        raise ValueError(
            f"schedule is {name!r}, expected one of {', '.join(policies)}, or a .json or .csv file"
        )
    return policies[name]


def problem_for(
    shapes: Mapping[str, Shape],
    costs: Mapping[str, Costs],
    memory_cap: float | None = None,
) -> Problem:
    """The scheduling problem of models that run together."""
    pipelines = []
    for name, shape in shapes.items():
        cost = costs.get(name, Costs())
        pipelines.append(
            Pipeline.make(
                name,
                shape.stages,
                shape.num_microbatches,
                cost.forward,
                0.0 if shape.forward_only else cost.backward,
                weight=0.0 if shape.forward_only else cost.weight,
                activation=cost.activation,
                interleaved=shape.chunks > 1,
            )
        )
    num_ranks = 1 + max(row for shape in shapes.values() for row in shape.rows)
    return Problem(num_ranks, tuple(pipelines), memory_cap)


def make_schedule(choice: Choice, problem: Problem) -> Schedule:
    """The chosen schedule for `problem`, proved to be legal and free of deadlock.

    Raises:
        ValueError: it does not fit (both numbers are named), is not legal, or would deadlock.
    """
    if isinstance(choice, str | Path) and Path(choice).suffix in (".json", ".csv"):
        choice = _from_file(Path(choice), problem)
    if isinstance(choice, Path):
        raise ValueError(f"schedule file {choice}: expected .json or .csv")
    if isinstance(choice, str):
        choice = policy_named(choice)
    if isinstance(choice, Schedule):
        schedule = _fitted(choice, problem)
    else:
        schedule = _fitted(choice(problem), problem)
    schedule.validate()
    check_channels(schedule)
    return schedule


def default_order(problem: Problem) -> Schedule:
    """1F1B; with several chunks on a rank Megatron's interleaved order, where it is defined."""
    if len(problem.pipelines) == 1 and problem.pipelines[0].interleaved:
        pipe = problem.pipelines[0]
        ranks = len(set(pipe.stages))
        if pipe.num_microbatches % ranks == 0 and not pipe.forward_only:
            rows = tuple(tuple(interleaved_row(pipe, rank)) for rank in range(ranks))
            return Schedule(problem, rows)
    return one_f_one_b(problem)


def interleaved_row(pipe: Pipeline, rank: int) -> Iterator[Task]:
    """One rank of interleaved 1F1B (arXiv 2104.04473), micro-batches in groups of the ranks."""
    ranks = len(set(pipe.stages))
    chunks, m = pipe.num_stages // ranks, pipe.num_microbatches
    order = [
        (mb, chunk)
        for start in range(0, m, ranks)
        for chunk in range(chunks)
        for mb in range(start, min(m, start + ranks))
    ]
    warm_up = min(len(order), 2 * (ranks - rank - 1) + (chunks - 1) * ranks)

    def forward(number: int) -> Task:
        mb, chunk = order[number]
        return Task(pipe.name, Op.F, chunk * ranks + rank, mb)

    def backward(number: int) -> Task:
        mb, chunk = order[number]
        return Task(pipe.name, Op.B, (chunks - 1 - chunk) * ranks + rank, mb)

    yield from map(forward, range(warm_up))
    for number in range(len(order)):
        if warm_up + number < len(order):
            yield forward(warm_up + number)
        yield backward(number)


def forwards_only(problem: Problem) -> Schedule:
    """For evaluation: every stage runs its micro-batches as they come."""
    if any(pipe.interleaved for pipe in problem.pipelines):
        return one_f_one_b(problem)
    rows: list[list[Task]] = [[] for _ in range(problem.num_ranks)]
    for pipe in problem.pipelines:
        for stage, rank in enumerate(pipe.stages):
            rows[rank] += [Task(pipe.name, Op.F, stage, m) for m in range(pipe.num_microbatches)]
    return Schedule(problem, tuple(map(tuple, rows)))


def most_in_flight(row: Sequence[Task], pipeline: str) -> int:
    """Most forwards whose backward has not been, at any time of this row; at least 1."""
    held, most = 0, 1
    for task in row:
        if task.pipeline == pipeline and task.op is not Op.W:
            held += 1 if task.op is Op.F else -1
            most = max(most, held)
    return most


def _from_file(path: Path, problem: Problem) -> Schedule:
    if path.suffix == ".csv":
        return from_torch_csv(path.read_text(), problem)
    return schedule_from_json(path.read_bytes())


def _fitted(schedule: Schedule, problem: Problem) -> Schedule:
    """The schedule's rows for `problem`, with its pipeline's name."""
    theirs, ours = schedule.problem.pipelines, problem.pipelines
    if len(theirs) != len(ours):
        raise ValueError(
            f"the schedule is for {len(theirs)} models ({', '.join(p.name for p in theirs)}), "
            f"the call brings {len(ours)} ({', '.join(p.name for p in ours)})"
        )
    names = {theirs[0].name: ours[0].name} if len(ours) == 1 else {p.name: p.name for p in ours}
    for pipe in theirs:
        if pipe.name not in names:
            raise ValueError(
                f"the schedule has a model {pipe.name!r}, the call brings {', '.join(names)}"
            )
        _check_fit(pipe, problem.pipeline(names[pipe.name]))
    rows = tuple(
        tuple(Task(names[t.pipeline], t.op, t.pp_stage, t.microbatch) for t in row)
        for row in schedule.rows
    )
    return Schedule(problem, rows)


def _check_fit(theirs: Pipeline, ours: Pipeline) -> None:
    where = f"schedule of {ours.name!r}"
    if theirs.num_stages != ours.num_stages:
        raise ValueError(
            f"{where} has {theirs.num_stages} stages, the model has {ours.num_stages}; make one "
            "for this model with `rlhfuse schedule`"
        )
    if theirs.num_microbatches != ours.num_microbatches:
        raise ValueError(
            f"{where} has {theirs.num_microbatches} micro-batches, the call brings "
            f"{ours.num_microbatches}; give a policy instead of a fixed schedule if counts change"
        )
    if theirs.stages != ours.stages:
        raise ValueError(
            f"{where} has its stages on ranks {theirs.stages}, the model on {ours.stages}"
        )
