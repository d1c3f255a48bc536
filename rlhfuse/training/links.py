"""Which message each task of a schedule waits for and sends, and their order per channel. Pure.

A *channel* is one link, one pipeline and one direction of flow; it is first in, first out, in the
order in which the sender's row makes its messages.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from rlhfuse.schedules.ir import Op, Schedule, Task


class Flow(StrEnum):
    """What a message carries: activations forward, their gradients backward."""

    ACTIVATION = "activation"
    GRADIENT = "gradient"

    __hash__ = str.__hash__  # an enumeration's own is Python code, and messages are looked up


class Channel(NamedTuple):
    """One first-in first-out way between two ranks (or from a rank to itself)."""

    source: int
    target: int
    pipeline: str
    flow: Flow


class Message(NamedTuple):
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


class PeerLost(RuntimeError):
    """A message did not come, or could not be sent; the message says which."""

    def __init__(self, text: str, peer: int, *, silent: bool = False) -> None:
        """`peer`: the row of the other end. `silent`: it is there, but the time limit is over."""
        super().__init__(text)
        self.peer = peer
        self.silent = silent


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


@dataclass(frozen=True, slots=True)
class _Link:
    """Where the result of one operation of one stage goes. `pp_stage` is the receiver's."""

    channel: Channel
    pp_stage: int

    def message(self, microbatch: int) -> Message:
        return Message(self.channel, self.pp_stage, microbatch)


_Place = tuple[str, Op, int]  # pipeline, operation, stage


def plan_row(schedule: Schedule, rank: int) -> RowPlan:
    """What `rank` does, and what it gets from other ranks."""
    made, needed = _links(schedule)
    steps = []
    for index, task in enumerate(schedule.rows[rank]):
        place = (task.pipeline, task.op, task.pp_stage)
        before, after = needed.get(place), made.get(place)
        steps.append(
            Step(
                index,
                task,
                None if before is None else before.message(task.microbatch),
                None if after is None else after.message(task.microbatch),
            )
        )
    return RowPlan(tuple(steps), _expected(schedule, rank, made))


def _links(schedule: Schedule) -> tuple[dict[_Place, _Link], dict[_Place, _Link]]:
    """Of every place that sends, where to; of every place that receives, on which link."""
    made: dict[_Place, _Link] = {}
    needed: dict[_Place, _Link] = {}
    for pipe in schedule.problem.pipelines:
        for below, above in pairwise(range(pipe.num_stages)):
            low, high = pipe.stages[below], pipe.stages[above]
            up = _Link(Channel(low, high, pipe.name, Flow.ACTIVATION), above)
            down = _Link(Channel(high, low, pipe.name, Flow.GRADIENT), below)
            made[pipe.name, Op.F, below] = needed[pipe.name, Op.F, above] = up
            for op in (Op.B, Op.I):
                made[pipe.name, op, above] = needed[pipe.name, op, below] = down
    return made, needed


def _expected(
    schedule: Schedule, rank: int, made: Mapping[_Place, _Link]
) -> dict[Channel, tuple[Message, ...]]:
    """Messages from other ranks, per channel in the order of their making."""
    arriving = {
        place: link
        for place, link in made.items()
        if link.channel.target == rank and link.channel.source != rank
    }
    expected: dict[Channel, list[Message]] = {}
    orders = {p: expected.setdefault(link.channel, []) for p, link in arriving.items()}
    for source in {link.channel.source for link in arriving.values()}:
        for task in schedule.rows[source]:
            place = (task.pipeline, task.op, task.pp_stage)
            if place in arriving:
                orders[place].append(arriving[place].message(task.microbatch))
    return {channel: tuple(order) for channel, order in expected.items() if order}
