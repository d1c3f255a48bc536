"""One rank's messages while it runs one schedule, between processes of one machine.

What `rlhfuse.training.exchange` is over process groups, over `LocalLinks`: nothing is posted, and
no send is left open, as it copies.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from functools import partial

import torch

from rlhfuse.training.form import Form
from rlhfuse.training.links import Message, RowPlan
from rlhfuse.training.local_link import LocalLinks


class LocalExchange:
    """All channels of one rank, for one schedule. Tensors are of the CPU. See `Ports`."""

    refill = None

    def __init__(self, links: LocalLinks, form: Callable[[Message], Form], plan: RowPlan) -> None:
        """`form`: of every message, its shape known."""
        asked, given = defaultdict(list), defaultdict(list)
        for step in plan.steps:
            if step.receives is not None and not step.receives.local:
                asked[step.receives.channel].append(step.receives)
            if step.sends is not None and not step.sends.local:
                given[step.sends.channel].append(step.sends)
        self._senders: dict[Message, Callable[[torch.Tensor], None]] = {}
        for way, order in given.items():
            self._senders |= links.source(way).senders([(m, form(m)) for m in order])
        self._receivers: dict[Message, Callable[[], torch.Tensor]] = {}
        for way, expected in plan.expected.items():
            self._receivers |= links.target(way).receivers([(m, form(m)) for m in expected])
        # With several stages on a rank, the sender's order need not be the receiver's.
        self._sorting = {
            way: deque(order) for way, order in plan.expected.items() if tuple(asked[way]) != order
        }
        self._ends = {
            way: links.target(way).taken + len(order) for way, order in plan.expected.items()
        }
        self._links = links
        self._arrived: dict[Message, torch.Tensor] = {}
        self._handed: dict[Message, torch.Tensor] = {}

    def receiver(self, message: Message) -> Callable[[], torch.Tensor]:
        """See `Ports`."""
        if message.local:
            return partial(self._handed.pop, message)
        if message.channel in self._sorting:
            return partial(self._sorted, message)
        return self._receivers[message]

    def sender(self, message: Message) -> Callable[[torch.Tensor], None]:
        """See `Ports`; the tensor may change afterwards, but for one that stays on this rank."""
        if message.local:
            return partial(self._handed.__setitem__, message)
        return self._senders[message]

    def drain(self) -> None:
        """See `Ports`."""
        left = {way: end - self._links.target(way).taken for way, end in self._ends.items()}
        assert not any(left.values()), f"left over: {left}"
        assert not self._arrived, f"never asked for: {list(self._arrived)}"
        assert not self._handed, f"handed over and never taken: {list(self._handed)}"

    def _sorted(self, message: Message) -> torch.Tensor:
        coming = self._sorting[message.channel]
        while message not in self._arrived:
            assert coming, f"{message} is not among those to come"
            first = coming.popleft()
            self._arrived[first] = self._receivers[first]()
        return self._arrived.pop(message)
