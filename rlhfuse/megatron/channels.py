"""Messages between pipeline stages whose shapes only the sender knows.

As `rlhfuse.training.channels`: one process group per flow, so that order alone says which message
is which (NCCL knows no tags), and sends do not block. Where all messages have one shape, a receive
is posted one message ahead and one send may be open per channel. Where shapes vary, a header with
the shape is posted ahead instead, the body when it is asked for, and two sends may be open: a rank
then blocks exactly where it does with fixed shapes, so one proof (`check_channels`) holds for both.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from rlhfuse.training.channels import PeerLost
from rlhfuse.training.links import Channel, Flow, Message

HEADER = 8
"""Numbers in a header: the number of dimensions, then each."""


@dataclass(frozen=True, slots=True)
class Format:
    """How one model's messages look: `shape` None where it varies."""

    shape: tuple[int, ...] | None
    dtype: torch.dtype


class FlowGroups:
    """Process groups for one pipeline's messages: one per direction of flow."""

    def __init__(self, ranks: Sequence[int], device: torch.device) -> None:
        """`ranks`: global, in stage order. Collective over all ranks of the world, of which each
        brings its own pipeline; uses every link once."""
        everywhere: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everywhere, tuple(ranks))
        self._groups: dict[Flow, dist.ProcessGroup] = {}
        # Local synchronization would not do: it names groups by how many a rank knows.
        for members in sorted(set(everywhere)):
            for flow in Flow:
                group = dist.new_group(sorted(members), timeout=_timeout(device))
                if members == tuple(ranks):
                    self._groups[flow] = group
        self.device = device
        self._warm_up(ranks)

    def of(self, flow: Flow) -> dist.ProcessGroup:
        return self._groups[flow]

    def close(self) -> None:
        """Leave the groups: peers that wait for this rank then fail at once."""
        while self._groups:
            _, group = self._groups.popitem()
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


@dataclass(slots=True)
class _Receiving:
    coming: deque[Message]
    posted: tuple[Message, torch.Tensor, dist.Work] | None = None
    arrived: dict[Message, torch.Tensor] = field(default_factory=dict)


class Wires:
    """All channels of one rank while it runs one schedule."""

    def __init__(
        self,
        ranks: Sequence[int],
        groups: Mapping[str, FlowGroups],
        formats: Mapping[str, Format],
        expected: Mapping[Channel, Iterable[Message]],
    ) -> None:
        """`ranks`: the global rank of each row. `expected`: all that comes here, by channel."""
        self._ranks = ranks
        self._groups = groups
        self._formats = formats
        self._receiving = {way: _Receiving(deque(order)) for way, order in expected.items()}
        self._sending: dict[Channel, deque[list[tuple[dist.Work, torch.Tensor]]]] = {}
        self._handed: dict[Message, torch.Tensor] = {}
        for way, receiving in self._receiving.items():
            self._post(way, receiving)

    def receive(self, message: Message) -> torch.Tensor:
        """The tensor that `message` carries; blocks until it is here (CUDA: queues the wait).

        Raises:
            PeerLost: the peer is gone, or silent for longer than the time limit.
        """
        if message.local:
            return self._handed.pop(message)
        receiving = self._receiving[message.channel]
        # With several chunks on a rank, the sender's order need not be the receiver's.
        while message not in receiving.arrived:
            assert receiving.posted is not None, f"{message} is not among those to come"
            first, buffer, work = receiving.posted
            _wait(work, f"waiting for {first}")
            receiving.arrived[first] = self._body(first, buffer)
            self._post(message.channel, receiving)
        return receiving.arrived.pop(message)

    def send(self, message: Message, tensor: torch.Tensor) -> None:
        """Start to send, once few enough sends of the channel are open. The tensor is kept."""
        if message.local:
            self._handed[message] = tensor
            return
        way = message.channel
        opened = self._sending.setdefault(way, deque())
        form = self._formats[way.pipeline]
        self._settle(opened, 1 if form.shape is None else 0, message)
        tensor = tensor.detach().contiguous()
        if form.shape is not None and tuple(tensor.shape) != form.shape:
            raise ValueError(
                f"{message} has shape {tuple(tensor.shape)}, the call announced {form.shape}; "
                "set variable_seq_lengths in the config if lengths differ"
            )
        parts = [tensor] if form.shape is not None else [_header(tensor), tensor]
        group = self._groups[way.pipeline].of(way.flow)
        opened.append(
            [(_started(dist.isend, part, self._ranks[way.target], group), part) for part in parts]
        )

    def drain(self) -> None:
        """Wait for the open sends; afterwards nothing of the schedule is left."""
        for way, opened in self._sending.items():
            self._settle(opened, 0, way)
        for way, receiving in self._receiving.items():
            left = [receiving.posted, *receiving.arrived]
            assert left == [None], f"{way}: {left} left over"
        assert not self._handed, f"handed over and never taken: {list(self._handed)}"

    def _settle(
        self, opened: deque[list[tuple[dist.Work, torch.Tensor]]], most: int, what: object
    ) -> None:
        while len(opened) > most:
            for work, _ in opened.popleft():
                _wait(work, f"waiting to send {what}")

    def _post(self, way: Channel, receiving: _Receiving) -> None:
        receiving.posted = None
        if not receiving.coming:
            return
        message = receiving.coming.popleft()
        form, device = self._formats[way.pipeline], self._groups[way.pipeline].device
        if form.shape is None:
            buffer = torch.empty(HEADER, dtype=torch.int64, device=device)
        else:
            buffer = torch.empty(form.shape, dtype=form.dtype, device=device)
        receiving.posted = (message, buffer, self._started_receive(way, buffer))

    def _body(self, message: Message, buffer: torch.Tensor) -> torch.Tensor:
        """What follows the header; the buffer itself where shapes are fixed."""
        way = message.channel
        form = self._formats[way.pipeline]
        if form.shape is not None:
            return buffer
        numbers = buffer.tolist()
        body = torch.empty(numbers[1 : 1 + numbers[0]], dtype=form.dtype, device=buffer.device)
        _wait(self._started_receive(way, body), f"waiting for {message}")
        return body

    def _started_receive(self, way: Channel, buffer: torch.Tensor) -> dist.Work:
        group = self._groups[way.pipeline].of(way.flow)
        return _started(dist.irecv, buffer, self._ranks[way.source], group)


def _timeout(device: torch.device) -> timedelta | None:
    """The default group's time limit, which new groups do not take over by themselves."""
    backend = dist.group.WORLD._get_backend(device) if dist.group.WORLD is not None else None
    limit = getattr(getattr(backend, "options", None), "_timeout", None)
    return limit if isinstance(limit, timedelta) else None


def _header(tensor: torch.Tensor) -> torch.Tensor:
    numbers = [tensor.dim(), *tensor.shape]
    numbers += [0] * (HEADER - len(numbers))
    return torch.tensor(numbers, dtype=torch.int64, device=tensor.device)


def _started(
    start: Callable[..., dist.Work | None],
    tensor: torch.Tensor,
    peer: int,
    group: dist.ProcessGroup,
) -> dist.Work:
    work = start(tensor, peer, group=group)
    assert work is not None, "this rank is not part of the pipeline's group"
    return work


def _wait(work: dist.Work, what: str) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise PeerLost(f"{what}: {error}") from error
