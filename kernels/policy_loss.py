"""Elementwise policy, value and KL terms over tokens.

The value loss has a Triton kernel, one launch forward and one backward. The others are the
definitions: on a CPU a handful of passes over T numbers, next to nothing beside the head.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhfuse.kernels import reference
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.reference import PolicyTerms, ValueTerms, kl_terms, policy_terms

__all__ = ["PolicyTerms", "ValueTerms", "kl_terms", "policy_terms", "value_terms"]


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> ValueTerms:
    """`reference.value_terms`; the gradient flows to `values` only."""
    if values.dtype == torch.float64 or choose(values.device) is not Path.TRITON:
        return reference.value_terms(values, old_values.detach(), returns.detach(), clip=clip)
    loss, clipped = _ValueTerms.apply(values, old_values, returns, clip)  # type: ignore[no-untyped-call]
    return ValueTerms(loss, clipped)


class _ValueTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
    ) -> tuple[Tensor, Tensor]:
        from rlhfuse.kernels import triton_whiten  # triton is optional

        ctx.clip = clip
        ctx.save_for_backward(values, old_values, returns)
        loss, clipped = triton_whiten.value_forward(values, old_values, returns, clip)
        ctx.mark_non_differentiable(clipped)
        return loss, clipped

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor, _: Tensor) -> tuple[Tensor, None, None, None]:
        from rlhfuse.kernels import triton_whiten  # triton is optional

        values, old_values, returns = ctx.saved_tensors
        gradient = triton_whiten.value_backward(values, old_values, returns, above, ctx.clip)
        return gradient, None, None, None
