"""Frozen scorers (reference, reward model) whose weights stay in the host's memory, and are on the
device only while it scores. Written for GPUs, where it has not been tried: there was none."""

from collections.abc import Mapping

import torch

from rlhfuse.messages import Role
from rlhfuse.models.stage import ModelStage
from rlhfuse.workers.common import give_back


class FrozenModels:
    """All come in together, one after the other, when the device begins to score (copies run
    beside what is scored first), and leave together."""

    def __init__(self, models: Mapping[Role, ModelStage], device: torch.device) -> None:
        """`models` are on `device`, and leave it. Pinned memory where that is a GPU."""
        self._device = device
        cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._arrived: dict[Role, torch.cuda.Event | None] = {}
        self._weights: dict[Role, list[tuple[torch.nn.Parameter, torch.Tensor]]] = {}
        for role, model in models.items():
            self._weights[role] = pairs = []
            for parameter in model.parameters():
                host = parameter.detach().cpu()
                pairs.append((parameter, host.pin_memory() if cuda else host))
        self._out()

    def come_in(self) -> None:
        """Start to copy what is not here; returns at once."""
        for role, pairs in self._weights.items():
            if role not in self._arrived:
                self._arrived[role] = self._copy(pairs)

    def _copy(
        self, pairs: list[tuple[torch.nn.Parameter, torch.Tensor]]
    ) -> "torch.cuda.Event | None":
        # Taken on the stream that will compute with it, and given back there.
        for parameter, host in pairs:
            parameter.data = torch.empty_like(host, device=self._device, pin_memory=False)
        if self._stream is None:
            for parameter, host in pairs:
                parameter.data.copy_(host)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for parameter, host in pairs:
                parameter.data.copy_(host, non_blocking=True)
        event: torch.cuda.Event = self._stream.record_event()
        return event

    def await_arrival(self, role: Role) -> None:
        """What is computed from here on finds the weights of `role`, whether it is ours or not."""
        event = self._arrived.get(role)
        if event is not None:
            torch.cuda.current_stream(self._device).wait_event(event)

    def leave(self) -> None:
        """Give their memory on the device back."""
        if self._arrived:
            for role in self._arrived:
                self.await_arrival(role)
            self._arrived.clear()
            self._out()
            give_back(self._device)

    def _out(self) -> None:
        for pairs in self._weights.values():
            for parameter, host in pairs:
                parameter.data = host
