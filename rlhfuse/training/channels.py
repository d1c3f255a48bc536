"""The channels of a set of pipelines, and their messages, schedule after schedule."""

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist

from rlhfuse.training.carrier import GroupCarrier
from rlhfuse.training.exchange import Exchange, Links
from rlhfuse.training.form import Form
from rlhfuse.training.links import Channel, Flow, Message, RowPlan
from rlhfuse.training.local_exchange import LocalExchange
from rlhfuse.training.local_link import LocalLinks, on_one_machine

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[Shape]]
"""Shape of the message of each micro-batch, by pipeline: known to all ranks from the plan."""


class Ports(Protocol):
    """One rank's messages while it runs one schedule, each made ready before the first task: to
    look something up between two tasks costs more than to call it."""

    @property
    def refill(self) -> Callable[[], None] | None:
        """To be called once a task's result is on its way, where there is something to do then."""

    def receiver(self, message: Message) -> Callable[[], torch.Tensor]:
        """What returns the tensor that `message` carries. Blocks until it is here (CUDA: queues
        the wait); raises `PeerLost` where it does not come within the time limit."""

    def sender(self, message: Message) -> Callable[[torch.Tensor], None]:
        """What sends `message`. Raises ValueError where the tensor has another shape or type than
        announced, `PeerLost` where nobody takes it."""

    def drain(self) -> None:
        """Wait for what is under way; afterwards nothing of the schedule is left."""


class Channels:
    """All channels of one rank, on whatever carries them best.

    Between processes of one machine, on CPUs: `LocalLinks`. Else process groups: one per (pipeline,
    flow), as order alone says which message is which and NCCL knows no tags; gloo does, and every
    group of its own costs a thread that wakes up a hundred times a second: one carries all flows.
    """

    def __init__(
        self,
        rank: int,
        pipelines: Mapping[str, Sequence[int]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        timeout: timedelta,
        tp: int = 1,
        local: bool = True,
    ) -> None:
        """Connect all ranks. Collective: all ranks call it alike.

        Args:
            pipelines: the rows of each pipeline's stages, in stage order. Row r is rank r; with
                tensor parallelism ranks ``r tp`` and up, each with channels to its like.
            dtype: of all messages.
            timeout: longest wait for one message.
            local: whether `LocalLinks` may be used.
        """
        self._row, self._column = divmod(rank, tp)
        self._tp = tp
        self._device = device
        self._dtype = dtype
        self.timeout = timeout
        self._groups: dict[tuple[str, Flow], dist.ProcessGroup] = {}
        self._tags: dict[tuple[str, Flow], int] = {}
        self._forms: dict[str, list[Form]] = {}
        self._local: LocalLinks | None = None
        self._carrier: GroupCarrier | None = None
        ways = all_channels(pipelines)
        if device.type == "cpu" and tp == 1 and local and ways and on_one_machine():
            self._local = LocalLinks(rank, ways, timeout)
        else:
            self._make_groups(rank, pipelines, timeout)
            self._carrier = GroupCarrier(self._peer, self._group, self._tag)
            self._warm_up(ways)

    def open(self, plan: RowPlan, shapes: Shapes) -> Ports:
        """Get ready for the messages of one schedule; one runs at a time."""
        self._forms = {
            name: [Form(tuple(shape), self._dtype) for shape in mine]
            for name, mine in shapes.items()
        }
        if self._local is not None:
            return LocalExchange(self._local, self._form, plan)
        assert self._carrier is not None
        return Exchange(Links(self._device, self._carrier, self._form), plan.expected)

    def size(self, message: Message) -> int:
        """Bytes that travel; none from a rank to itself."""
        return 0 if message.local else self._form(message).size

    def close(self) -> None:
        """Leave, also in the middle of a schedule: peers that wait for this rank (and peers that
        wait for them) then fail at once instead of at the time limit."""
        if self._local is not None:
            self._local.close()
        groups = dict.fromkeys(self._groups.values())
        self._groups.clear()
        for group in groups:
            try:
                dist.destroy_process_group(group)
            except RuntimeError as error:
                logger.warning("leaving a process group: %s", error)

    def _peer(self, row: int) -> int:
        """The rank of `row` that this one speaks with."""
        return row * self._tp + self._column

    def _group(self, way: Channel) -> dist.ProcessGroup:
        return self._groups[way.pipeline, way.flow]

    def _tag(self, way: Channel) -> int:
        return self._tags[way.pipeline, way.flow]

    def _form(self, message: Message) -> Form:
        return self._forms[message.channel.pipeline][message.microbatch]

    def _make_groups(
        self, rank: int, pipelines: Mapping[str, Sequence[int]], timeout: timedelta
    ) -> None:
        flows = [(name, flow) for name in sorted(pipelines) for flow in Flow]
        self._tags |= {flow: tag for tag, flow in enumerate(flows)}
        shares = [flows] if self._device.type == "cpu" else [[flow] for flow in flows]
        for share in shares:
            rows = {row for name, _ in share for row in pipelines[name]}
            for column in range(self._tp):
                ranks = sorted(row * self._tp + column for row in rows)
                group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    self._groups |= dict.fromkeys(share, group)

    def _warm_up(self, ways: Sequence[Channel]) -> None:
        """One message over every link, in one order on all ranks (NCCL connects at first use)."""
        token = torch.zeros(1, dtype=self._dtype, device=self._device)
        for way in ways:
            if self._row == way.source:
                dist.send(token, self._peer(way.target), self._group(way), self._tag(way))
            elif self._row == way.target:
                dist.recv(token, self._peer(way.source), self._group(way), self._tag(way))


def all_channels(pipelines: Mapping[str, Sequence[int]]) -> list[Channel]:
    """Between different rows, in one order on all ranks."""
    ways = [
        Channel(source, target, name, flow)
        for name in sorted(pipelines)
        for below, above in itertools.pairwise(pipelines[name])
        if below != above
        for flow, source, target in (
            (Flow.ACTIVATION, below, above),
            (Flow.GRADIENT, above, below),
        )
    ]
    return list(dict.fromkeys(ways))
