"""Mean and variance of what a mask keeps, with their gradient."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.reference import accumulation_dtype


@dataclass(frozen=True, slots=True)
class Statistics:
    """Count, mean and unbiased variance (divisor n - 1), float64 numbers on the values' device; all
    0 where there is no value. Mean and variance carry gradients."""

    count: Tensor
    mean: Tensor
    variance: Tensor


def masked_statistics(values: Tensor, mask: Tensor | None = None) -> Statistics:
    """Of the kept values, any shape; `reference.mean_and_variance`, without a wait for the device.

    Stable where the mean is far from 0: two passes over a block, blocks merged by their means
    (Chan et al. 1979). Triton: one launch forward, one backward.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if mask is not None and values.shape != mask.shape:
        raise ValueError(
            f"values and mask must have one shape, not {tuple(values.shape)} and "
            f"{tuple(mask.shape)}"
        )
    found = statistics_op(values, None if mask is None else mask.bool())
    return Statistics(*found.unbind())


def _by_triton(values: Tensor) -> bool:
    return accumulation_dtype(values) == torch.float32 and choose(values.device) is Path.TRITON


@torch.library.custom_op("rlhfuse::statistics", mutates_args=())
def statistics_op(values: Tensor, mask: Tensor | None) -> Tensor:
    """Count, mean and variance, float64 [3]."""
    if _by_triton(values):
        from rlhfuse.kernels import triton_whiten  # triton is optional

        return triton_whiten.statistics(values, mask)
    kept = (values if mask is None else values[mask]).double()
    count = kept.new_full((), float(kept.numel()))
    mean = kept.sum() / count.clamp_min(1.0)
    variance = (kept - mean).square().sum() / (count - 1.0).clamp_min(1.0)
    return torch.stack([count, mean, variance])


@statistics_op.register_fake
def _(values: Tensor, mask: Tensor | None) -> Tensor:
    return values.new_empty(3, dtype=torch.float64)


@torch.library.custom_op("rlhfuse::statistics_backward", mutates_args=())
def _backward(values: Tensor, mask: Tensor | None, found: Tensor, above: Tensor) -> Tensor:
    """Gradient by the values."""
    if _by_triton(values):
        from rlhfuse.kernels import triton_whiten  # triton is optional

        return triton_whiten.statistics_backward(values, mask, found, above)
    count, mean, _ = found.unbind()
    slope = 2.0 * above[2] / (count - 1.0).clamp_min(1.0)
    gradient = above[1] / count.clamp_min(1.0) + slope * (values.double() - mean)
    if mask is not None:
        gradient = torch.where(mask, gradient, 0.0)
    return gradient.to(values.dtype, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(values: Tensor, mask: Tensor | None, found: Tensor, above: Tensor) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _autograd_backward(ctx: Any, above: Tensor) -> tuple[Tensor, None]:
    gradient: Tensor = _backward(*ctx.saved_tensors, above)
    return gradient, None


statistics_op.register_autograd(_autograd_backward, setup_context=_setup_context)
