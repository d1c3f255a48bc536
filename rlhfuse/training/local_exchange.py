"""One rank's messages while it runs one schedule, between processes of one machine.

What `rlhfuse.training.exchange` is over process groups, over `LocalLinks`: nothing is posted, and
no send is left open, as it copies.
"""

from collections import deque
from collections.abc import Callable, Iterable, Mapping

import torch

from rlhfuse.training.exchange import Form, PeerLost
from rlhfuse.training.links import Channel, Message
from rlhfuse.training.local_link import LocalLinks, Target


class LocalExchange:
    """All channels of one rank, for one schedule. Tensors are of the CPU."""

    def __init__(
        self,
        links: LocalLinks,
        form: Callable[[Message], Form],
        expected: Mapping[Channel, Iterable[Message]],
    ) -> None:
        """`form`: of every message, its shape known. `expected`: all that comes here."""
        self._links = links
        self._form = form
        self._coming = {way: (links.target(way), deque(order)) for way, order in expected.items()}
        self._targets = [target for target, _ in self._coming.values()]
        self._arrived: dict[Message, torch.Tensor] = {}
        self._handed: dict[Message, torch.Tensor] = {}

    def receive(self, message: Message) -> torch.Tensor:
        """See `Exchange`."""
        if message.local:
            return self._handed.pop(message)
        if self._arrived and message in self._arrived:
            return self._arrived.pop(message)
        target, coming = self._coming[message.channel]
        # With several stages on a rank, the sender's order need not be the receiver's.
        while True:
            assert coming, f"{message} is not among those to come"
            first = coming.popleft()
            tensor = self._take(target, first)
            if first == message:
                return tensor
            self._arrived[first] = tensor

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """See `Exchange`; `tensor` may change afterwards."""
        if message.local:
            self._handed[message] = tensor
            return
        if not tensor.is_contiguous():
            tensor = tensor.contiguous()
        self._form(message).check(message, tensor)
        try:
            self._links.source(message.channel).put(tensor)
        except RuntimeError as error:
            raise PeerLost(f"waiting to send {message}: {error}") from error

    def refill(self) -> None:
        """See `Exchange`: tell others that there is room again."""
        for target in self._targets:
            target.tell()

    def drain(self) -> None:
        """Afterwards nothing of the schedule is left."""
        for way, (_, coming) in self._coming.items():
            assert not coming, f"{way}: {list(coming)} left over"
        assert not self._arrived, f"never asked for: {list(self._arrived)}"
        assert not self._handed, f"handed over and never taken: {list(self._handed)}"

    def _take(self, target: Target, message: Message) -> torch.Tensor:
        form = self._form(message)
        assert form.shape is not None, f"the shape of {message} is not known"
        buffer = torch.empty(form.shape, dtype=form.dtype)
        try:
            target.take(buffer)
        except RuntimeError as error:
            raise PeerLost(f"waiting for {message}: {error}") from error
        return buffer
