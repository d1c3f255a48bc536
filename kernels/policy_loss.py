"""Elementwise policy, value and KL terms over tokens.

The value loss has a Triton kernel, one launch forward and one backward. The others are the
definitions: on a CPU a handful of passes over T numbers, next to nothing beside the head.
"""

from typing import Any

import torch
from torch import Tensor

from rlhfuse.kernels import reference
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.reference import (
    PolicyTerms,
    ValueTerms,
    accumulation_dtype,
    kl_terms,
    policy_terms,
)

__all__ = ["PolicyTerms", "ValueTerms", "kl_terms", "policy_terms", "value_terms"]


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> ValueTerms:
    """`reference.value_terms`; the gradient flows to `values` only."""
    if not _by_triton(values):
        return reference.value_terms(values, old_values.detach(), returns.detach(), clip=clip)
    loss, clipped = value_terms_op(values, old_values.detach(), returns.detach(), clip)
    return ValueTerms(loss, clipped)


def _by_triton(values: Tensor) -> bool:
    return values.dtype != torch.float64 and choose(values.device) is Path.TRITON


@torch.library.custom_op("rlhfuse::value_terms", mutates_args=())
def value_terms_op(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Loss and whether it was clipped, of each token: one node of a compiled graph."""
    if _by_triton(values):
        from rlhfuse.kernels import triton_value  # triton is optional

        return triton_value.value_forward(values, old_values, returns, clip)
    wide = values.to(accumulation_dtype(values))
    terms = reference.value_terms(wide, old_values, returns, clip=clip)
    return terms.loss, terms.clipped


@value_terms_op.register_fake
def _(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    loss = torch.empty_like(
        values, dtype=accumulation_dtype(values), memory_format=torch.contiguous_format
    )
    return loss, torch.empty_like(loss, dtype=torch.bool)


@torch.library.custom_op("rlhfuse::value_terms_backward", mutates_args=())
def _backward(
    values: Tensor, old_values: Tensor, returns: Tensor, above: Tensor, clip: float | None
) -> Tensor:
    """Gradient by the values."""
    if _by_triton(values):
        from rlhfuse.kernels import triton_value  # triton is optional

        return triton_value.value_backward(values, old_values, returns, above, clip)
    # Autograd does not run inside an operator.
    wide = values.to(accumulation_dtype(values))
    slope = wide - returns
    if clip is not None:
        near = torch.minimum(torch.maximum(wide, old_values - clip), old_values + clip)
        plain, bounded = slope.square(), (near - returns).square()
        # Where both branches are equal each has half, as torch's maximum shares it.
        share = torch.where(bounded > plain, 0.0, torch.where(bounded == plain, 0.5, 1.0))
        slope = torch.where(near == wide, slope, share * slope)
    return (slope * above).to(values.dtype, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    values: Tensor, old_values: Tensor, returns: Tensor, above: Tensor, clip: float | None
) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.clip = inputs
    ctx.save_for_backward(*tensors)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the latter would be one more launch


def _autograd_backward(ctx: Any, above: Tensor | None, _: None) -> tuple[Tensor, None, None, None]:
    assert above is not None, "what is not differentiable has asked for a gradient"
    gradient: Tensor = _backward(*ctx.saved_tensors, above, ctx.clip)
    return gradient, None, None, None


value_terms_op.register_autograd(_autograd_backward, setup_context=_setup_context)
