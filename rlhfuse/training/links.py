"""Which message each task of a schedule waits for and sends, and their order per channel. Pure.

A *channel* is one link, one pipeline and one direction of flow; it is first in, first out, in the
order in which the sender's row makes its messages.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from rlhfuse.schedules.ir import Op, Schedule, Task


class Flow(StrEnum):
    """What a message carries: activations forward, their gradients backward."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"


@dataclass(frozen=True, slots=True)
class Channel:
    """One first-in first-out way between two ranks (or from a rank to itself)."""

    source: int
    target: int
    pipeline: str
    flow: Flow


@dataclass(frozen=True, slots=True)
class Message:
    """What one task sends to another. `pp_stage` is the receiver's."""

    channel: Channel
    pp_stage: int
    microbatch: int

    @property
    def local(self) -> bool:
        """Between two stages of one rank: handed over, not sent."""
        return self.channel.source == self.channel.target

    def __str__(self) -> str:
        way = self.channel
        return (
            f"{way.pipeline} {way.flow.value} of micro-batch {self.microbatch} "
            f"for stage {self.pp_stage} (rank {way.source} to rank {way.target})"
        )


@dataclass(frozen=True, slots=True)
class Step:
    """A task of a row with the message it needs first and the one it makes."""

    index: int
    task: Task
    receives: Message | None
    sends: Message | None


@dataclass(frozen=True, slots=True)
class RowPlan:
    """One rank's row, and all that reaches the rank, per channel in the sender's order."""

    steps: tuple[Step, ...]
    expected: dict[Channel, tuple[Message, ...]]


def plan_row(schedule: Schedule, rank: int) -> RowPlan:
    """What `rank` does, and what it gets from other ranks."""
    steps = tuple(
        Step(index, task, _receives(schedule, task), _sends(schedule, task))
        for index, task in enumerate(schedule.rows[rank])
    )
    expected: dict[Channel, list[Message]] = {}
    for message in _all_messages(schedule):
        if message.channel.target == rank and not message.local:
            expected.setdefault(message.channel, []).append(message)
    return RowPlan(steps, {channel: tuple(order) for channel, order in expected.items()})


def _all_messages(schedule: Schedule) -> Iterator[Message]:
    for row in schedule.rows:
        for task in row:
            message = _sends(schedule, task)
            if message is not None:
                yield message


def _sends(schedule: Schedule, task: Task) -> Message | None:
    stages = schedule.problem.pipeline(task.pipeline).stages
    if task.op is Op.F and task.pp_stage + 1 < len(stages):
        flow, receiver = Flow.ACTIVATION, task.pp_stage + 1
    elif task.op in (Op.B, Op.I) and task.pp_stage > 0:
        flow, receiver = Flow.GRADIENT, task.pp_stage - 1
    else:
        return None
    way = Channel(stages[task.pp_stage], stages[receiver], task.pipeline, flow)
    return Message(way, receiver, task.microbatch)


def _receives(schedule: Schedule, task: Task) -> Message | None:
    stages = schedule.problem.pipeline(task.pipeline).stages
    if task.op is Op.F and task.pp_stage > 0:
        flow, sender = Flow.ACTIVATION, task.pp_stage - 1
    elif task.op in (Op.B, Op.I) and task.pp_stage + 1 < len(stages):
        flow, sender = Flow.GRADIENT, task.pp_stage + 1
    else:
        return None
    way = Channel(stages[sender], stages[task.pp_stage], task.pipeline, flow)
    return Message(way, task.pp_stage, task.microbatch)
