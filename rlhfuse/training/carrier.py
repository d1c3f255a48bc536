"""What carries the messages of channels from rank to rank, where it is a process group."""

from collections.abc import Callable

import torch
import torch.distributed as dist

from rlhfuse.training.links import Channel


class GroupCarrier:
    """Over process groups: NCCL, gloo. First in, first out on every channel."""

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

    def send(self, way: Channel, tensor: torch.Tensor) -> dist.Work:
        """Begin to send a contiguous tensor; it may change once the result has been waited for.

        Raises:
            RuntimeError: here or in the result's `wait`, the other end is gone, or silent for
                longer than the time limit.
        """
        group, target, tag = self._end(way, way.target)
        return group.send([tensor], target, tag)

    def receive(self, way: Channel, buffer: torch.Tensor) -> dist.Work:
        """Post the receive of the next message, of the form of `buffer`, which is full once the
        result has been waited for. Raises as `send`."""
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
