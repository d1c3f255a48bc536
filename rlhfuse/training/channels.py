"""Point-to-point messages between pipeline stages over torch.distributed.

One process group per (pipeline, flow), so that order alone says which message is which: NCCL knows
no tags. A receive is posted one message ahead on each channel. A send does not block; its buffer is
kept until it is complete, and a channel has at most one open send: a second one first waits for it.
`rlhfuse.schedules.timing` proves by the same rule that a schedule cannot lock up.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhfuse.training.links import Channel, Flow, Message

logger = logging.getLogger(__name__)

Shape = tuple[int, ...]
Shapes = Mapping[str, Sequence[Shape]]
"""Shape of the message of each micro-batch, by pipeline: known to all ranks from the plan."""


class PeerLost(RuntimeError):
    """A message did not come, or could not be sent; the message says which."""


@dataclass(slots=True)
class _Receiving:
    """A channel's receiving end: what is still to come, what is posted, what has arrived."""

    coming: list[Message]
    posted: tuple[Message, torch.Tensor, dist.Work] | None = None
    arrived: dict[Message, torch.Tensor] = field(default_factory=dict)


class Channels:
    """All channels of one rank."""

    def __init__(
        self,
        rank: int,
        pipelines: Mapping[str, Sequence[int]],
        *,
        device: torch.device,
        dtype: torch.dtype,
        timeout: timedelta,
        tp: int = 1,
    ) -> None:
        """Make the process groups and use every link once. Collective: all ranks call it alike.

        Args:
            pipelines: the rows of each pipeline's stages, in stage order. Row r is rank r; with
                tensor parallelism ranks ``r tp`` and up, each with channels to its like.
            dtype: of all messages.
            timeout: longest wait for one message.
        """
        self._row, self._column = divmod(rank, tp)
        self._tp = tp
        self._device = device
        self._dtype = dtype
        self._groups: dict[tuple[str, Flow], dist.ProcessGroup] = {}
        self._receiving: dict[Channel, _Receiving] = {}
        self._sending: dict[Channel, tuple[dist.Work, torch.Tensor]] = {}
        self._handed: dict[Message, torch.Tensor] = {}
        self._shapes: Shapes = {}
        for name in sorted(pipelines):
            for flow in Flow:
                for column in range(tp):
                    ranks = sorted(row * tp + column for row in set(pipelines[name]))
                    group = dist.new_group(ranks, timeout=timeout)
                    if rank in ranks:
                        self._groups[name, flow] = group
        self._warm_up(pipelines)

    def open(self, expected: Mapping[Channel, Sequence[Message]], shapes: Shapes) -> None:
        """Get ready for the messages of one schedule: post the first receive of each channel."""
        assert not self._receiving, "a schedule is still running"
        self._shapes = shapes
        for channel, messages in expected.items():
            self._receiving[channel] = _Receiving(list(messages))
            self._post(self._receiving[channel])

    def receive(self, message: Message) -> torch.Tensor:
        """The tensor that `message` carries; blocks until it is here (CUDA: queues the wait).

        Raises:
            PeerLost: the peer is gone, or silent for longer than the time limit.
        """
        if message.local:
            return self._handed.pop(message)
        receiving = self._receiving[message.channel]
        # With several stages on a rank, the sender's order need not be the receiver's.
        while message not in receiving.arrived:
            assert receiving.posted is not None, f"{message} is not among those to come"
            first, buffer, work = receiving.posted
            _wait(work, f"waiting for {first}")
            receiving.arrived[first] = buffer
            self._post(receiving)
        return receiving.arrived.pop(message)

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Start to send, once the channel's open send, if any, is complete. `tensor` must not
        change until this one is."""
        if message.local:
            self._handed[message] = tensor
            return
        way = message.channel
        opened = self._sending.pop(way, None)
        if opened is not None:
            _wait(opened[0], f"waiting to send {message}")
        expected = self._shapes[way.pipeline][message.microbatch]
        assert tuple(tensor.shape) == tuple(expected), f"{message}: {tensor.shape} {expected}"
        tensor = tensor.contiguous()
        with _peer(f"beginning to send {message}"):  # gloo notices here, too, that it is gone
            work = dist.isend(
                tensor, self._peer(way.target), group=self._groups[way.pipeline, way.flow]
            )
        assert work is not None, "this rank is not part of the pipeline's group"
        self._sending[way] = (work, tensor)

    def drain(self) -> None:
        """Wait for the open sends; afterwards nothing of the schedule is left."""
        while self._sending:
            channel = next(iter(self._sending))
            _wait(self._sending.pop(channel)[0], f"waiting for the last send on {channel}")
        for channel, receiving in self._receiving.items():
            left = [receiving.posted, *receiving.arrived]
            assert left == [None], f"{channel}: {left} left over"
        assert not self._handed, f"handed over and never taken: {list(self._handed)}"
        self._receiving.clear()

    def close(self) -> None:
        """Leave the groups, also in the middle of a schedule: peers that wait for this rank (and
        peers that wait for them) then fail at once instead of at the time limit."""
        self._sending.clear()
        self._receiving.clear()
        self._handed.clear()
        while self._groups:
            _, group = self._groups.popitem()
            try:
                dist.destroy_process_group(group)
            except RuntimeError as error:
                logger.warning("leaving a process group: %s", error)

    def _post(self, receiving: _Receiving) -> None:
        receiving.posted = None
        if not receiving.coming:
            return
        message = receiving.coming.pop(0)
        way = message.channel
        shape = self._shapes[way.pipeline][message.microbatch]
        buffer = torch.empty(shape, dtype=self._dtype, device=self._device)
        with _peer(f"getting ready for {message}"):
            work = dist.irecv(
                buffer, self._peer(way.source), group=self._groups[way.pipeline, way.flow]
            )
        assert work is not None, "this rank is not part of the pipeline's group"
        receiving.posted = (message, buffer, work)

    def _peer(self, row: int) -> int:
        """The rank of `row` that this one speaks with."""
        return row * self._tp + self._column

    def _warm_up(self, pipelines: Mapping[str, Sequence[int]]) -> None:
        """One message over every link, in one order on all ranks (NCCL connects at first use)."""
        token = torch.zeros(1, dtype=self._dtype, device=self._device)
        for name in sorted(pipelines):
            stages = pipelines[name]
            for below, above in itertools.pairwise(stages):
                if below == above:
                    continue
                for flow, source, target in (
                    (Flow.ACTIVATION, below, above),
                    (Flow.GRADIENT, above, below),
                ):
                    if self._row == source:
                        dist.send(token, self._peer(target), group=self._groups[name, flow])
                    elif self._row == target:
                        dist.recv(token, self._peer(source), group=self._groups[name, flow])


def _wait(work: dist.Work, what: str) -> None:
    with _peer(what):
        work.wait()


@contextlib.contextmanager
def _peer(what: str) -> Iterator[None]:
    """Failures of the backend are the peer's."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"{what}: {error}") from error
