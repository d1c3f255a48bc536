"""How much memory autograd holds, on any device: what a memory model is compared with."""

import weakref
from collections.abc import Callable, Sequence

import torch


class HeldBytes:
    """Bytes that autograd holds for backward passes: each storage once, parameters left out; and
    what is held beside it, for weight gradients that are split off."""

    def __init__(
        self, parameters: Sequence[torch.Tensor], beside: Callable[[], int] = lambda: 0
    ) -> None:
        self._left_out = {p.untyped_storage().data_ptr() for p in parameters}
        self._beside = beside
        self._holders: dict[int, int] = {}
        self.now = self.peak = 0

    def watch(self) -> torch.autograd.graph.saved_tensors_hooks:
        """Counts while it is entered."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: torch.Tensor) -> "_Kept":
        storage = tensor.untyped_storage()
        kept = _Kept(tensor)
        if storage.data_ptr() not in self._left_out:
            where, size = storage.data_ptr(), storage.nbytes()
            if not self._holders.get(where):
                self.now += size
                self._note()
            self._holders[where] = self._holders.get(where, 0) + 1
            weakref.finalize(kept, self._free, where, size)
        return kept

    def _unpack(self, kept: "_Kept") -> torch.Tensor:
        self._note()
        return kept.tensor

    def _note(self) -> None:
        self.peak = max(self.peak, self.now + self._beside())

    def _free(self, where: int, size: int) -> None:
        self._holders[where] -= 1
        if not self._holders[where]:
            self.now -= size


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
