# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: PPO's value loss, one launch forward and one backward."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


@triton.jit(do_not_specialize=["num_values", "clip"])
def _value_forward(
    values_ptr, old_ptr, returns_ptr, loss_ptr, clipped_ptr, num_values, clip,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_values
    value = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
    target = tl.load(returns_ptr + at, mask=live, other=0.0).to(tl.float32)
    plain = (value - target) * (value - target)
    bounded = plain
    if CLIP:
        old = tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
        near = tl.minimum(tl.maximum(value, old - clip), old + clip)
        bounded = (near - target) * (near - target)
    tl.store(loss_ptr + at, 0.5 * tl.maximum(plain, bounded), mask=live)
    tl.store(clipped_ptr + at, (bounded > plain).to(tl.int8), mask=live)


@triton.jit(do_not_specialize=["num_values", "clip"])
def _value_backward(
    values_ptr, old_ptr, returns_ptr, above_ptr, gradient_ptr, num_values, clip,
    CLIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_values
    value = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
    target = tl.load(returns_ptr + at, mask=live, other=0.0).to(tl.float32)
    slope = value - target
    if CLIP:
        old = tl.load(old_ptr + at, mask=live, other=0.0).to(tl.float32)
        near = tl.minimum(tl.maximum(value, old - clip), old + clip)
        plain = slope * slope
        bounded = (near - target) * (near - target)
        # Where both branches are equal each has half, as torch's maximum shares it.
        share = tl.where(bounded > plain, 0.0, tl.where(bounded == plain, 0.5, 1.0))
        slope = tl.where(near == value, slope, share * slope)
    above = tl.load(above_ptr + at, mask=live, other=0.0).to(tl.float32)
    tl.store(gradient_ptr + at, slope * above, mask=live)


def value_forward(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Loss float32 and whether it was clipped, bool, of each value."""
    values, old, target = (part.contiguous() for part in (values, old_values, returns))
    loss = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    clipped = torch.empty(values.shape, dtype=torch.bool, device=values.device)
    if values.numel():
        _value_forward[(-(-values.numel() // _BLOCK),)](
            values, old, target, loss, clipped.view(torch.int8), values.numel(), clip or 0.0,
            CLIP=clip is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return loss, clipped


def value_backward(
    values: Tensor, old_values: Tensor, returns: Tensor, above: Tensor, clip: float | None
) -> Tensor:
    """Gradient by the values, in their type."""
    values, old, target, above = (
        part.contiguous() for part in (values, old_values, returns, above)
    )
    gradient = torch.empty_like(values)
    if values.numel():
        _value_backward[(-(-values.numel() // _BLOCK),)](
            values, old, target, above, gradient, values.numel(), clip or 0.0,
            CLIP=clip is not None, BLOCK=_BLOCK, num_warps=8,
        )  # fmt: skip
    return gradient
