"""What carries the messages of channels from rank to rank."""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from rlhfuse.training.links import Channel


class Pending(Protocol):
    """A message that was given, or asked for."""

    def wait(self) -> object:
        """Until it is through: the tensor that was sent may change, the one to be filled is full.

        Raises:
            RuntimeError: the other end is gone, or silent for longer than the time limit.
        """


class Carrier(Protocol):
    """First in, first out on every channel."""

    @property
    def open_sends(self) -> int:
        """How many sends of a channel may be open when another one begins."""

    def send(self, way: Channel, tensor: torch.Tensor) -> Pending:
        """Begin to send a contiguous tensor. Raises RuntimeError as `Pending.wait`."""

    def receive(self, way: Channel, buffer: torch.Tensor) -> Pending:
        """Get ready for the next message, of the form of `buffer`. Raises as `Pending.wait`."""


class GroupCarrier:
    """Over process groups: NCCL, gloo."""

    def __init__(
        self,
        peer: Callable[[int], int],
        group: Callable[[Channel], dist.ProcessGroup],
        tag: Callable[[Channel], int] = lambda channel: 0,
    ) -> None:
        """`peer`: row of a schedule to the global rank that this one speaks with. `tag`: tells the
        channels of one group apart, where its backend knows tags."""
        self._peer = peer
        self._group = group
        self._tag = tag
        self._ends: dict[tuple[Channel, int], tuple[dist.ProcessGroup, int, int]] = {}

    @property
    def open_sends(self) -> int:
        """None: a send needs no more than that its receive is posted, and two may be."""
        return 0

    def send(self, way: Channel, tensor: torch.Tensor) -> Pending:
        """See `Carrier`."""
        group, target, tag = self._end(way, way.target)
        return group.send([tensor], target, tag)

    def receive(self, way: Channel, buffer: torch.Tensor) -> Pending:
        """See `Carrier`."""
        group, source, tag = self._end(way, way.source)
        return group.recv([buffer], source, tag)

    def _end(self, way: Channel, row: int) -> tuple[dist.ProcessGroup, int, int]:
        """The group of a channel, the place of `row` in it, and the channel's tag."""
        found = self._ends.get((way, row))
        if found is None:
            group = self._group(way)
            found = group, dist.get_group_rank(group, self._peer(row)), self._tag(way)
            self._ends[way, row] = found
        return found
