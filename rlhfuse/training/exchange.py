"""One rank's messages while it runs one schedule: receives posted ahead, sends that do not block.

Two receives are posted on each channel; `refill` fills the place of one that was taken, when nobody
waits for this rank. A send's buffer is kept until it is complete, and a second one on its channel
first waits for it. Where only the sender knows a message's shape, one header is posted ahead
instead, the body when it is asked for, and two sends may be open: a rank then blocks no earlier
than with one receive posted ahead, so one proof (`rlhfuse.schedules.timing.check_channels`) holds
for both. Headers are for the host: they travel between CPUs, in groups of their own where the
bodies' groups are a GPU's, so that to read one is not to wait for the device. Between processes of
one machine, `rlhfuse.training.local_exchange` takes the place of all this.
"""

import re
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist

from rlhfuse.training.carrier import GroupCarrier
from rlhfuse.training.form import Form
from rlhfuse.training.links import Channel, Message, PeerLost

HEADER = 8
"""Numbers in a header: the number of dimensions, then each."""
_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Links:
    """How one rank reaches the others."""

    device: torch.device
    carrier: GroupCarrier
    form: Callable[[Message], Form]
    headers: GroupCarrier | None = None
    """For tensors of the CPU; needed where a shape is None."""


@dataclass(slots=True)
class _Receiving:
    """A channel's receiving end: what is still to come, what is posted, what has arrived."""

    coming: deque[Message]
    posted: deque[tuple[Message, torch.Tensor, dist.Work]] = field(default_factory=deque)
    arrived: dict[Message, torch.Tensor] = field(default_factory=dict)


class Exchange:
    """All channels of one rank over process groups, for one schedule."""

    def __init__(self, links: Links, expected: Mapping[Channel, Iterable[Message]]) -> None:
        """Posts the first receives of each channel. `expected`: all that comes here."""
        self._links = links
        self._receiving = {way: _Receiving(deque(order)) for way, order in expected.items()}
        self._sending: dict[Channel, deque[list[tuple[dist.Work, torch.Tensor]]]] = {}
        self._handed: dict[Message, torch.Tensor] = {}
        self._short = list(self._receiving.values())  # with fewer receives posted than may be
        self.refill()

    def receiver(self, message: Message) -> Callable[[], torch.Tensor]:
        """See `Ports`."""
        return partial(self.receive, message)

    def sender(self, message: Message) -> Callable[[torch.Tensor], None]:
        """See `Ports`."""
        return partial(self.send, message)

    def receive(self, message: Message) -> torch.Tensor:
        """The tensor that `message` carries; blocks until it is here (CUDA: queues the wait).

        Raises:
            PeerLost: the peer is gone, or silent for longer than the time limit.
        """
        if message.local:
            return self._handed.pop(message)
        receiving = self._receiving[message.channel]
        # With several stages on a rank, the sender's order need not be the receiver's.
        while not receiving.arrived or message not in receiving.arrived:
            if not receiving.posted:
                self.refill()
            assert receiving.posted, f"{message} is not among those to come"
            first, buffer, work = receiving.posted.popleft()
            _wait(work, f"waiting for {first}", first.channel.source)
            tensor = self._body(first, buffer)
            self._short.append(receiving)
            if not receiving.posted:  # a send that waits must not find this rank without one
                self.refill()
            if first == message:
                return tensor
            receiving.arrived[first] = tensor
        return receiving.arrived.pop(message)

    def refill(self) -> None:
        """Post receives in the place of those that were taken. To be called once a task's result
        is on its way: until then, others wait for this rank."""
        while self._short:
            receiving = self._short.pop()
            while receiving.coming and len(receiving.posted) < self._ahead(receiving.coming[0]):
                self._post(receiving)

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Start to send, once few enough sends of the channel are open. `tensor` is kept, and must
        not change until this one is complete.

        Raises:
            ValueError: the tensor has another shape than announced.
            PeerLost: as `receive`.
        """
        if message.local:
            self._handed[message] = tensor
            return
        form = self._links.form(message)
        opened = self._sending.setdefault(message.channel, deque())
        _settle(opened, 1 if form.shape is None else 0, message.channel, message)
        tensor = tensor.detach()
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        form.check(message, tensor)
        sent = [] if form.shape is not None else [(_header(tensor), True)]
        sent.append((tensor, False))
        opened.append([(self._sent(message, part, header), part) for part, header in sent])

    def drain(self) -> None:
        """Wait for the open sends; afterwards nothing of the schedule is left."""
        for way, opened in self._sending.items():
            _settle(opened, 0, way, way)
        for way, receiving in self._receiving.items():
            left = [*receiving.posted, *receiving.coming, *receiving.arrived]
            assert not left, f"{way}: {left} left over"
        assert not self._handed, f"handed over and never taken: {list(self._handed)}"

    def _ahead(self, message: Message) -> int:
        """Receives posted at one time: of headers one, since a body follows each."""
        return 1 if self._links.form(message).shape is None else _AHEAD

    def _post(self, receiving: _Receiving) -> None:
        message = receiving.coming.popleft()
        form = self._links.form(message)
        header = form.shape is None
        if form.shape is None:
            buffer = torch.empty(HEADER, dtype=torch.int64)
        else:
            buffer = torch.empty(form.shape, dtype=form.dtype, device=self._links.device)
        receiving.posted.append((message, buffer, self._coming(message, buffer, header)))

    def _body(self, message: Message, buffer: torch.Tensor) -> torch.Tensor:
        """What follows a header; the buffer itself where the shape was known."""
        form = self._links.form(message)
        if form.shape is not None:
            return buffer
        numbers = buffer.tolist()
        size = numbers[1 : 1 + numbers[0]]
        body = torch.empty(size, dtype=form.dtype, device=self._links.device)
        work = self._coming(message, body, header=False)
        _wait(work, f"waiting for {message}", message.channel.source)
        return body

    def _sent(self, message: Message, tensor: torch.Tensor, header: bool) -> dist.Work:
        try:  # a carrier may notice here, too, that the peer is gone
            return self._carrier(header).send(message.channel, tensor)
        except RuntimeError as error:
            raise _lost(f"beginning to send {message}", message.channel.target, error) from error

    def _coming(self, message: Message, buffer: torch.Tensor, header: bool) -> dist.Work:
        try:
            return self._carrier(header).receive(message.channel, buffer)
        except RuntimeError as error:
            raise _lost(f"getting ready for {message}", message.channel.source, error) from error

    def _carrier(self, header: bool) -> GroupCarrier:
        if not header:
            return self._links.carrier
        assert self._links.headers is not None, "no carrier for shapes"
        return self._links.headers


def _settle(
    opened: deque[list[tuple[dist.Work, torch.Tensor]]], most: int, way: Channel, what: object
) -> None:
    """Wait until `most` sends of a channel are open, before `what` is sent."""
    while len(opened) > most:
        for work, _ in opened.popleft():
            _wait(work, f"waiting to send {what}", way.target)


def _wait(work: dist.Work, doing: str, peer: int) -> None:
    """Failures of the backend are the peer's."""
    try:
        work.wait()
    except RuntimeError as error:
        raise _lost(doing, peer, error) from error


def _lost(doing: str, peer: int, error: RuntimeError) -> PeerLost:
    """gloo and NCCL tell only in words whether a time limit was over."""
    silent = re.search(r"timed? ?out", str(error), re.IGNORECASE) is not None
    return PeerLost(f"{doing}: {error}", peer, silent=silent)


def _header(tensor: torch.Tensor) -> torch.Tensor:
    numbers = [tensor.dim(), *tensor.shape]
    numbers += [0] * (HEADER - len(numbers))
    return torch.tensor(numbers, dtype=torch.int64)
