"""The schedule language: operations, tasks, pipelines, problems and schedules.

Words: a *pipeline* is one model's training pipeline; its *pp_stages* sit on *ranks* (devices). A
*task* is one operation of one pp_stage on one micro-batch. A *schedule* lists, per rank, its
tasks in issue order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum


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
        """A pipeline from numbers or one number per stage. Checked by `Problem`."""

        def per_stage(value: float | Sequence[float]) -> tuple[float, ...]:
            if isinstance(value, int | float):
                return (float(value),) * len(stages)
            return tuple(float(v) for v in value)

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
            release=release,
            deadline=deadline,
            interleaved=interleaved,
        )

    @property
    def num_stages(self) -> int:
        return len(self.stages)

    @property
    def forward_only(self) -> bool:
        return not any(self.backward)

    def duration(self, op: Op, pp_stage: int, microbatch: int) -> float:
        """Time of one task."""
        base = {
            Op.F: self.forward[pp_stage],
            Op.B: self.backward[pp_stage],
            Op.I: self.backward[pp_stage] - self.weight[pp_stage],
            Op.W: self.weight[pp_stage],
        }[op]
        return base * self.microbatch_weights[microbatch]


@dataclass(frozen=True, slots=True)
class Problem:
    """Pipelines that share ranks. `link_latency[(a, b)]` is a pure delay between two ranks."""

    num_ranks: int
    pipelines: tuple[Pipeline, ...]
    memory_cap: float | None = None
    link_latency: float | Mapping[tuple[int, int], float] = 0.0

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


def rows_from_text(text: str) -> tuple[tuple[Task, ...], ...]:
    """The rows that `Schedule.to_text` wrote."""
    return tuple(tuple(Task.parse(word) for word in line.split()) for line in text.split("\n"))
