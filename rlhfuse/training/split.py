"""Weight gradients apart from input gradients, exactly (zero-bubble schedules, arXiv 2401.10241).

The linear layers of a stage hand their weight gradient to a `WeightStore`, which computes it at
once (`B`) or later (`I`, then `W`), by one and the same matrix product: so a split backward equals
an unsplit one bit for bit. What is not the weight of a linear layer (norms, embeddings) is cheap,
and stays in `I`. After `I` only the inputs of linear layers and the gradients of their outputs are
held; the rest of the graph is free.
"""

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from rlhfuse.training.gradients import GradientSums


class WeightStore:
    """One stage's weight gradients that are still to be computed, by micro-batch."""

    def __init__(self, sums: GradientSums) -> None:
        self._sums = sums
        self._deferred: dict[int, list[_Product]] = {}
        self._open: int | None = None

    @property
    def num_held(self) -> int:
        """Micro-batches between `I` and `W`."""
        return len(self._deferred)

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept for `compute`; what several layers have read counts once."""
        kept = {
            tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
            for products in self._deferred.values()
            for product in products
            for tensor in (product.rows, product.gradient)
        }
        return sum(kept.values())

    def defer(self, microbatch: int) -> None:
        """From now on, keep the products of this micro-batch for `compute`."""
        self._open = microbatch
        self._deferred[microbatch] = []

    def compute_at_once(self) -> None:
        """From now on, compute products where they arise."""
        self._open = None

    def add(self, product: "_Product") -> None:
        """Called in the backward pass of a linear layer, where no graph is made."""
        if self._open is None:
            product.compute(self._sums)
        else:
            self._deferred[self._open].append(product)

    def compute(self, microbatch: int) -> None:
        """Compute and forget what was kept of this micro-batch."""
        with torch.no_grad():
            for product in self._deferred.pop(microbatch):
                product.compute(self._sums)

    def clear(self) -> None:
        """Forget everything (a step was given up)."""
        self._deferred.clear()
        self._open = None


def split_linears(module: nn.Module, store: WeightStore) -> None:
    """Let every linear layer inside `module` (or itself) leave its weight gradient to `store`. They
    stay the modules that they are, with their hooks and under their names: how they compute is
    changed. Subclasses of `nn.Linear` compute in ways of their own, and are left alone."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.forward = _SplitForward(child, store)  # type: ignore[method-assign]


class _SplitForward:
    """In place of a linear layer's own `forward`."""

    def __init__(self, linear: nn.Linear, store: WeightStore) -> None:
        self._linear = linear
        self._store = store

    def __call__(self, input: torch.Tensor) -> torch.Tensor:  # named as nn.Linear's own
        weight, bias = self._linear.weight, self._linear.bias
        if not torch.is_grad_enabled():
            return functional.linear(input, weight, bias)
        out: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            input, weight, bias, self._store
        )
        return out


class _Product(NamedTuple):
    """A weight (and bias) gradient to come: of rows [..., in] and output gradient [..., out]."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    rows: torch.Tensor
    gradient: torch.Tensor

    def compute(self, sums: GradientSums) -> None:
        """To be called without a graph. Many and small where layers are: nothing is in vain."""
        rows, gradient = self.rows, self.gradient
        if gradient.dim() != 2:
            rows, gradient = _flat(rows), _flat(gradient)
        if self.weight.requires_grad:
            sums.add(self.weight, gradient.T @ rows)
        if self.bias is not None and self.bias.requires_grad:
            sums.add(self.bias, gradient.sum(0))


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1, tensor.shape[-1])


class _Linear(torch.autograd.Function):
    """rows @ weight.T + bias, whose weight gradient goes to a store.

    The weight is an argument so that the output requires a gradient on a first stage too.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        store: WeightStore,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.linear, ctx.store = (weight, bias), store
        return functional.linear(rows, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None]:
        (rows,) = ctx.saved_tensors
        weight, bias = ctx.linear
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            ctx.store.add(_Product(weight, bias, rows.detach(), gradient))
        by_rows = gradient @ weight if ctx.needs_input_grad[0] else None
        return by_rows, None, None, None
