"""Process groups for the messages between a Megatron pipeline's stages; see `Exchange`."""

import itertools
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlhfuse.training.links import Flow


class FlowGroups:
    """Process groups for one pipeline's messages: one per direction of flow, and where shapes
    travel too, another one (gloo) per direction for those."""

    def __init__(self, ranks: Sequence[int], device: torch.device, *, shapes: bool) -> None:
        """`ranks`: global, in stage order. Collective over all ranks of the world, of which each
        brings its own pipeline; uses every link once."""
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, tuple(ranks))
        self._groups: dict[Flow, dist.ProcessGroup] = {}
        self._shapes: dict[Flow, dist.ProcessGroup] = {}
        # Local synchronization would not do: it names groups by how many a rank knows.
        for members in sorted(set(everywhere)):
            for flow in Flow:
                group = dist.new_group(sorted(members), timeout=_timeout(device))
                if members == tuple(ranks):
                    self._groups[flow] = group
                if not shapes:
                    continue
                group = dist.new_group(sorted(members), timeout=_timeout(device), backend="gloo")
                if members == tuple(ranks):
                    self._shapes[flow] = group
        self.device = device
        self._warm_up(ranks)

    def of(self, flow: Flow) -> dist.ProcessGroup:
        return self._groups[flow]

    def shapes_of(self, flow: Flow) -> dist.ProcessGroup:
        return self._shapes[flow]

    def close(self) -> None:
        """Leave the groups: peers that wait for this rank then fail at once."""
        left = [*self._groups.values(), *self._shapes.values()]
        self._groups.clear()
        self._shapes.clear()
        for group in left:
            try:
                dist.destroy_process_group(group)
            except (RuntimeError, AssertionError):
                continue  # the other end is gone already

    def _warm_up(self, ranks: Sequence[int]) -> None:
        token = torch.zeros(1, device=self.device)
        links = list(itertools.pairwise(ranks))
        if len(ranks) > 2:
            links.append((ranks[-1], ranks[0]))  # from the last rank to the first: model chunks
        me = dist.get_rank()
        for below, above in links:
            for flow in Flow:
                for source, target in ((below, above), (above, below)):
                    if me == source:
                        dist.send(token, target, group=self.of(flow))
                    elif me == target:
                        dist.recv(token, source, group=self.of(flow))


def _timeout(device: torch.device) -> timedelta | None:
    """The default group's time limit, which new groups do not take over by themselves."""
    backend = dist.group.WORLD._get_backend(device) if dist.group.WORLD is not None else None
    limit = getattr(getattr(backend, "options", None), "_timeout", None)
    return limit if isinstance(limit, timedelta) else None
