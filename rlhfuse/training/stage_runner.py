"""Runs the tasks of one pipeline stage through autograd."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from rlhfuse.training.split import WeightStore

Compute = Callable[[int, torch.Tensor | None], torch.Tensor]
"""(micro-batch, received input or None) -> the stage's output; on the last stage the loss []."""


@dataclass(frozen=True, slots=True)
class _Saved:
    """What the forward of a micro-batch left for its backward."""

    received: torch.Tensor | None
    output: torch.Tensor


class AutogradRunner:
    """A `StageRunner` over any differentiable computation. All state is per micro-batch."""

    def __init__(
        self,
        compute: Compute,
        *,
        last: bool,
        weights: WeightStore | None = None,
        recompute: bool = False,
        frozen: bool = False,
    ) -> None:
        """`weights`: the store of the computation's split linear layers; without one, `I` and `W`
        are refused. `recompute`: hold only the input, and compute the stage again in backward.
        `frozen`: a first stage that trains nothing: its backward has nothing to do."""
        self._compute = compute
        self._last = last
        self._weights = weights
        self._recompute = recompute
        self._frozen = frozen
        self._saved: dict[int, _Saved] = {}

    @property
    def num_held(self) -> int:
        """Micro-batches between forward and backward."""
        return len(self._saved)

    @property
    def deferred_bytes(self) -> int:
        """Bytes that wait for `weight_gradient`."""
        return 0 if self._weights is None else self._weights.nbytes

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """See `StageRunner`."""
        assert microbatch not in self._saved, f"{microbatch=} is already in flight"
        if received is not None:
            received.requires_grad_()
        with torch.enable_grad():
            if self._recompute:
                output = checkpoint(self._compute, microbatch, received, use_reentrant=False)
            else:
                output = self._compute(microbatch, received)
        self._saved[microbatch] = _Saved(received, output)
        return None if self._last else output.detach()

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """See `StageRunner`."""
        saved = self._saved.pop(microbatch)
        if self._frozen:
            return None
        torch.autograd.backward(saved.output, gradient)
        return None if saved.received is None else saved.received.grad

    def input_gradient(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """See `StageRunner`."""
        assert self._weights is not None, "this stage was not made for a split backward"
        self._weights.defer(microbatch)
        try:
            return self.backward(microbatch, gradient)
        finally:
            self._weights.compute_at_once()

    def weight_gradient(self, microbatch: int) -> None:
        """See `StageRunner`."""
        assert self._weights is not None, "this stage was not made for a split backward"
        self._weights.compute(microbatch)

    def clear(self) -> None:
        """Forget all micro-batches (a step was given up)."""
        self._saved.clear()
        if self._weights is not None:
            self._weights.clear()


class ForwardRunner:
    """A `StageRunner` of a forward-only pipeline: nothing is kept for a backward pass."""

    def __init__(self, compute: Compute, *, last: bool) -> None:
        self._compute = compute
        self._last = last

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        """See `StageRunner`."""
        with torch.no_grad():
            output = self._compute(microbatch, received)
        return None if self._last else output

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Never asked for."""
        raise AssertionError(f"{microbatch=}: a forward-only stage has no backward pass")

    def input_gradient(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        """Never asked for."""
        raise AssertionError(f"{microbatch=}: a forward-only stage has no backward pass")

    def weight_gradient(self, microbatch: int) -> None:
        """Never asked for."""
        raise AssertionError(f"{microbatch=}: a forward-only stage has no backward pass")
