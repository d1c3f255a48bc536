"""The group of all ranks over which they agree on numbers."""

from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist


class Control:
    """Collective calls on small CPU tensors: gloo, also where tensors travel over NCCL.

    It alone holds the process group. A group that is destroyed stays connected while anything
    refers to it, and whoever waits for this rank would go on waiting.
    """

    def __init__(self, timeout: timedelta, ranks: Sequence[int] | None = None) -> None:
        """Collective. `timeout`: longest wait of a call. `ranks`: all where None."""
        group: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend="gloo")
        self._group = [group]

    def sum_up(self, numbers: torch.Tensor) -> None:
        """All ranks' `numbers` become their sum."""
        dist.all_reduce(numbers, group=self._group[0])

    def broadcast(self, numbers: torch.Tensor, source: int) -> None:
        """All ranks' `numbers` become those of rank `source`."""
        dist.broadcast(numbers, source, group=self._group[0])

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(self._group[0])

    def close(self) -> None:
        """Leave, also in the middle of a call of others: it fails there at once."""
        if self._group:
            dist.destroy_process_group(self._group.pop())
