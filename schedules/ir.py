"""The schedule language: operations, tasks, pipelines, problems and schedules.

Words: a *pipeline* is one model's training pipeline; its *pp_stages* sit on *ranks* (devices). A
*task* is one operation of one pp_stage on one micro-batch. A *schedule* lists, per rank, its
tasks in issue order.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import isfinite

MAX_TASKS = 5_000_000  # a typing slip (10^9 micro-batches) must not eat the machine
MAX_RANKS = 100_000
REL_TOL = 1e-6  # every comparison of times and of memory


class Op(StrEnum):
    """An operation on one micro-batch, with torch's letters."""

    F = "F"  # forward
    B = "B"  # full backward: input and weight gradients
    I = "I"  # noqa: E741  input gradient only (torch's letter)
    W = "W"  # weight gradient only


_TASK = re.compile(r"(?P<pipeline>[^\s:]+):(?P<stage>\d+)(?P<op>[FBIW])(?P<mb>\d+)")


@dataclass(frozen=True, slots=True, order=True)
class Task:
    """One operation of one pipeline stage on one micro-batch; text form ``actor:2F0``."""

    pipeline: str
    op: Op
    pp_stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.pipeline}:{self.pp_stage}{self.op.value}{self.microbatch}"

    @classmethod
    def parse(cls, text: str) -> "Task":
        """The task that `text` names.

        Raises:
            ValueError: `text` is not of the form ``pipeline:stage op microbatch``.
        """
        match = _TASK.fullmatch(text)
        if match is None:
            raise ValueError(f"not a task: {text!r} (expected a form like actor:2F0)")
        return cls(match["pipeline"], Op(match["op"]), int(match["stage"]), int(match["mb"]))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """One model's pipeline. Durations are in any one unit; one entry per pp_stage.

    `stages[s]` is the rank of pp_stage s: a reversed pipeline lists its ranks reversed.
    `weight` is the part of `backward` that may be split off as W, so I lasts backward - weight.
    `activation` is held on the rank from the start of F to the end of B (or of W where split;
    after I only `activation_after_input`). ``backward == 0`` everywhere means forward-only.
    `microbatch_weights` scales durations and activation of each micro-batch.
    """

    name: str
    stages: tuple[int, ...]
    num_microbatches: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]
    activation: tuple[float, ...]
    activation_after_input: tuple[float, ...]
    microbatch_weights: tuple[float, ...]
    release: float = 0.0
    deadline: float | None = None
    interleaved: bool = False

    @classmethod
    def make(
        cls,
        name: str,
        stages: Sequence[int],
        num_microbatches: int,
        forward: float | Sequence[float],
        backward: float | Sequence[float],
        *,
        weight: float | Sequence[float] = 0.0,
        activation: float | Sequence[float] = 1.0,
        activation_after_input: float | Sequence[float] | None = None,
        microbatch_weights: Sequence[float] | None = None,
        release: float = 0.0,
        deadline: float | None = None,
        interleaved: bool = False,
    ) -> "Pipeline":
        """A pipeline from numbers or one number per stage. Checked by `Problem`.

        Raises:
            ValueError: so many micro-batches that the pipeline could not be stored.
        """

        def per_stage(value: float | Sequence[float]) -> tuple[float, ...]:
            if isinstance(value, int | float):
                return (float(value),) * len(stages)
            return tuple(float(v) for v in value)

        _check_count(f"pipeline {name!r}", len(stages), num_microbatches)
        held = activation if activation_after_input is None else activation_after_input
        weights = (1.0,) * num_microbatches if microbatch_weights is None else microbatch_weights
        return cls(
            name=name,
            stages=tuple(stages),
            num_microbatches=num_microbatches,
            forward=per_stage(forward),
            backward=per_stage(backward),
            weight=per_stage(weight),
            activation=per_stage(activation),
            activation_after_input=per_stage(held),
            microbatch_weights=tuple(float(w) for w in weights),
            release=float(release),
            deadline=None if deadline is None else float(deadline),
            interleaved=interleaved,
        )

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def forward_only(self) -> bool:
        return not any(self.backward)

    def duration(self, op: Op, pp_stage: int, microbatch: int | None = None) -> float:
        """Time of one task; without a micro-batch, of one of weight 1."""
        base = {
            Op.F: self.forward[pp_stage],
            Op.B: self.backward[pp_stage],
            Op.I: self.backward[pp_stage] - self.weight[pp_stage],
            Op.W: self.weight[pp_stage],
        }[op]
        return base if microbatch is None else base * self.microbatch_weights[microbatch]

    def memory_change(
        self, op: Op, pp_stage: int, microbatch: int | None = None
    ) -> tuple[float, float]:
        """What a task adds to its rank's memory when it starts, and when it ends."""
        weight = 1.0 if microbatch is None else self.microbatch_weights[microbatch]
        whole = self.activation[pp_stage] * weight
        kept = self.activation_after_input[pp_stage] * weight
        if op is Op.F:
            return (whole, -whole if self.forward_only else 0.0)
        return (0.0, {Op.B: -whole, Op.I: kept - whole, Op.W: -kept}[op])


@dataclass(frozen=True, slots=True)
class Problem:
    """Pipelines that share ranks. `link_latency[(a, b)]` is a pure delay between two ranks.

    Raises:
        ValueError: a value that no schedule could make sense of, with its place.
    """

    num_ranks: int
    pipelines: tuple[Pipeline, ...]
    memory_cap: float | None = None
    link_latency: float | Mapping[tuple[int, int], float] = 0.0

    def __post_init__(self) -> None:
        _check_problem(self)

    def pipeline(self, name: str) -> Pipeline:
        return next(p for p in self.pipelines if p.name == name)

    def latency(self, source: int, target: int) -> float:
        """Delay of a message from one rank to another; zero on one rank."""
        if source == target:
            return 0.0
        if isinstance(self.link_latency, int | float):
            return float(self.link_latency)
        both = self.link_latency.get((source, target), self.link_latency.get((target, source)))
        return 0.0 if both is None else both


@dataclass(frozen=True, slots=True)
class Schedule:
    """A problem and, per rank, its tasks in issue order."""

    problem: Problem
    rows: tuple[tuple[Task, ...], ...]

    def to_text(self) -> str:
        """One line per rank, tasks separated by blanks. `rows_from_text` reads it back."""
        return "\n".join(" ".join(str(task) for task in row) for row in self.rows)

    def tasks(self) -> Iterator[tuple[int, int, Task]]:
        """Every task with its place: (rank, index in the rank's row, task)."""
        for rank, row in enumerate(self.rows):
            for index, task in enumerate(row):
                yield rank, index, task

    def validate(self) -> None:
        """Check all that makes the schedule a legal answer to its problem.

        Every task is there once, on its rank, in the order that gradient accumulation needs; no
        tasks wait for each other in a circle; memory stays under the cap and pipelines end by
        their deadlines.

        Raises:
            ValueError: what is wrong, and the schedule with the place marked.
        """
        from rlhfuse.schedules.checks import check_schedule  # it needs the types of this file

        if len(self.rows) != self.problem.num_ranks:
            raise ValueError(
                f"schedule has {len(self.rows)} rows for {self.problem.num_ranks} ranks"
            )
        check_schedule(self)

    def marked(self, rank: int, index: int, reach: int = 6) -> str:
        """The rows around one place, as text, with that place between ``>>`` and ``<<``."""
        lines = []
        for r, row in enumerate(self.rows):
            first, last = max(0, index - reach), index + reach + 1
            words = [str(task) for task in row[first:last]]
            if r == rank and first <= index < first + len(words):
                words[index - first] = f">>{words[index - first]}<<"
            head = "... " if first else ""
            tail = " ..." if last < len(row) else ""
            note = "   <-- ERROR HERE" if r == rank else ""
            lines.append(f"rank {r}: {head}{' '.join(words)}{tail}{note}")
        return "\n".join(lines)


def rows_from_text(text: str) -> tuple[tuple[Task, ...], ...]:
    """The rows that `Schedule.to_text` wrote."""
    return tuple(tuple(Task.parse(word) for word in line.split()) for line in text.split("\n"))


def _check_count(where: str, num_stages: int, num_microbatches: int) -> None:
    if isinstance(num_microbatches, bool) or not isinstance(num_microbatches, int):
        raise ValueError(f"{where}: microbatches is {num_microbatches!r}, expected a whole number")
    if num_microbatches < 1:
        raise ValueError(f"{where}: microbatches is {num_microbatches}, expected at least 1")
    if 3 * num_microbatches * num_stages > MAX_TASKS:
        raise ValueError(
            f"{where}: {num_microbatches} micro-batches on {num_stages} stages are too many tasks "
            f"(at most {MAX_TASKS // 3} in all)"
        )


def _check_problem(problem: Problem) -> None:
    if not isinstance(problem.num_ranks, int) or problem.num_ranks < 1:
        raise ValueError(f"ranks is {problem.num_ranks!r}, expected a whole number of at least 1")
    if problem.num_ranks > MAX_RANKS:
        raise ValueError(f"ranks is {problem.num_ranks}, expected at most {MAX_RANKS}")
    if not problem.pipelines:
        raise ValueError("pipelines is empty, expected at least one")
    names = [pipe.name for pipe in problem.pipelines]
    for pipe in problem.pipelines:
        if not re.fullmatch(r"[^\s:,]+", pipe.name):
            raise ValueError(
                f"pipeline name {pipe.name!r} must be a word without blank, ':' or ','"
            )
        if names.count(pipe.name) > 1:
            raise ValueError(f"two pipelines are named {pipe.name!r}; give each its own name")
        _check_pipeline(problem.num_ranks, pipe)
    _check_count("problem", 1, sum(p.num_stages * p.num_microbatches for p in problem.pipelines))
    cap = problem.memory_cap
    if cap is not None and not (isfinite(cap) and cap > 0):
        raise ValueError(f"memory_cap is {cap}, expected a positive number")
    _check_links(problem)


def _check_links(problem: Problem) -> None:
    links = problem.link_latency
    table = {(0, 0): links} if isinstance(links, int | float) else links
    for pair, seconds in table.items():
        if not all(0 <= rank < problem.num_ranks for rank in pair):
            raise ValueError(
                f"link_latency names rank pair {pair}, ranks are 0 to {problem.num_ranks - 1}"
            )
        if not (isfinite(seconds) and seconds >= 0):
            raise ValueError(f"link_latency is {seconds}, expected a number of at least 0")


def _check_pipeline(num_ranks: int, pipe: Pipeline) -> None:
    where = f"pipeline {pipe.name!r}"
    if not pipe.stages:
        raise ValueError(f"{where}: stages is empty, expected the rank of each stage")
    _check_count(where, pipe.num_stages, pipe.num_microbatches)
    for stage, rank in enumerate(pipe.stages):
        if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < num_ranks:
            raise ValueError(
                f"{where}: stage {stage} is on rank {rank!r}, ranks are 0 to {num_ranks - 1}"
            )
        if not pipe.interleaved and pipe.stages.index(rank) != stage:
            raise ValueError(
                f"{where}: rank {rank} appears twice in stages; say interleaved: true if meant"
            )
    for key in ("forward", "backward", "weight", "activation", "activation_after_input"):
        _check_numbers(f"{where}: {key}", getattr(pipe, key), pipe.num_stages, "stages")
    for stage, (weight, backward) in enumerate(zip(pipe.weight, pipe.backward, strict=True)):
        if weight > backward:
            raise ValueError(
                f"{where}: weight {weight:g} of stage {stage} exceeds its backward {backward:g}, "
                "of which it is a part"
            )
    _check_numbers(
        f"{where}: microbatch_weights",
        pipe.microbatch_weights,
        pipe.num_microbatches,
        "micro-batches",
    )
    if not (isfinite(pipe.release) and pipe.release >= 0):
        raise ValueError(f"{where}: release is {pipe.release}, expected a number of at least 0")
    if pipe.deadline is not None and not (isfinite(pipe.deadline) and pipe.deadline > pipe.release):
        raise ValueError(f"{where}: deadline is {pipe.deadline}, expected one after the release")


def _check_numbers(where: str, values: Sequence[float], count: int, what: str) -> None:
    if len(values) != count:
        raise ValueError(f"{where} has {len(values)} numbers for {count} {what}")
    for index, value in enumerate(values):
        if not (isfinite(value) and value >= 0):
            raise ValueError(f"{where}[{index}] is {value}, expected a number of at least 0")
