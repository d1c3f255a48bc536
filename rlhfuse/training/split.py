"""Weight gradients apart from input gradients, exactly (zero-bubble schedules, arXiv 2401.10241).

The linear layers of a stage hand their weight gradient to a `WeightStore`, which computes it at
once (`B`) or later (`I`, then `W`), by one and the same matrix product: so a split backward equals
an unsplit one bit for bit. What is not the weight of a linear layer (norms, embeddings) is cheap,
and stays in `I`. After `I` only the inputs of linear layers and the gradients of their outputs are
held; the rest of the graph is free.
"""

from typing import Any

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
        """Bytes of what is kept for `compute`."""
        return sum(p.nbytes for products in self._deferred.values() for p in products)

    def defer(self, microbatch: int) -> None:
        """From now on, keep the products of this micro-batch for `compute`."""
        self._open = microbatch
        self._deferred[microbatch] = []

    def compute_at_once(self) -> None:
        """From now on, compute products where they arise."""
        self._open = None

    def add(self, product: "_Product") -> None:
        """Called in the backward pass of a linear layer."""
        if self._open is None:
            product.compute(self._sums)
        else:
            self._deferred[self._open].append(product)

    def compute(self, microbatch: int) -> None:
        """Compute and forget what was kept of this micro-batch."""
        for product in self._deferred.pop(microbatch):
            product.compute(self._sums)

    def clear(self) -> None:
        """Forget everything (a step was given up)."""
        self._deferred.clear()
        self._open = None


class SplitLinear(nn.Module):
    """In place of an `nn.Linear`, with its parameters under their own names."""

    def __init__(self, linear: nn.Linear, store: WeightStore) -> None:
        super().__init__()
        self.weight = linear.weight
        self.bias = linear.bias
        self._store = store

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """As `nn.Linear`."""
        if not torch.is_grad_enabled():
            return functional.linear(rows, self.weight, self.bias)
        out: torch.Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            rows, self.weight, self.bias, self._store
        )
        return out


def split_linears(module: nn.Module, store: WeightStore) -> None:
    """Let every linear layer inside `module` leave its weight gradient to `store`."""
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear:
            module.set_submodule(name, SplitLinear(child, store))


class _Product:
    """A weight (and bias) gradient to come: of rows [T, in] and output gradient [T, out]."""

    def __init__(self, linear: "_Saved", rows: torch.Tensor, gradient: torch.Tensor) -> None:
        self._weight, self._bias = linear
        self._rows = rows
        self._gradient = gradient

    @property
    def nbytes(self) -> int:
        return self._rows.nbytes + self._gradient.nbytes

    @torch.no_grad()
    def compute(self, sums: GradientSums) -> None:
        gradient = self._gradient.reshape(-1, self._gradient.shape[-1])
        if self._weight.requires_grad:
            sums.add(self._weight, gradient.T @ self._rows.reshape(-1, self._rows.shape[-1]))
        if self._bias is not None and self._bias.requires_grad:
            sums.add(self._bias, gradient.sum(0))


_Saved = tuple[nn.Parameter, nn.Parameter | None]


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
            ctx.store.add(_Product(ctx.linear, rows.detach(), gradient))
        by_rows = gradient @ ctx.linear[0] if ctx.needs_input_grad[0] else None
        return by_rows, None, None, None
