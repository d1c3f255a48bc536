# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: moments, whitening by them, and PPO's value loss; one launch each, no wait for a device.

Moments are (count, mean, squared deviations) of blocks, [P, 3]: two passes inside a block, merged
(Chan et al. 1979) by whoever needs them, also those of several ranks laid end to end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048
_MERGED = 1024


@triton.jit(do_not_specialize=["num_values"])
def _moments(values_ptr, mask_ptr, out_ptr, num_values, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    live = at < num_values
    if MASKED:
        live = live & (tl.load(mask_ptr + at, mask=live, other=0) != 0)
    values = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
    count = tl.sum(live.to(tl.float32), 0)
    mean = tl.sum(values, 0) / tl.maximum(count, 1.0)
    centred = tl.where(live, values - mean, 0.0)
    tl.store(out_ptr + block * 3, count)
    tl.store(out_ptr + block * 3 + 1, mean)
    tl.store(out_ptr + block * 3 + 2, tl.sum(centred * centred, 0))


@triton.jit(do_not_specialize=["num_values", "num_parts", "eps"])
def _whiten(
    values_ptr, mask_ptr, moments_ptr, out_ptr, num_values, num_parts, eps,
    SHIFT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    # Every program merges all parts: they are few, and in the cache. Double precision, because
    # the mean of means is subtracted from them.
    lanes = tl.arange(0, MERGED)
    count = tl.zeros([MERGED], tl.float64)
    total = tl.zeros([MERGED], tl.float64)
    start = num_parts * 0
    while start < num_parts:
        part = start + lanes
        inside = part < num_parts
        own = tl.load(moments_ptr + part * 3, mask=inside, other=0.0).to(tl.float64)
        mean = tl.load(moments_ptr + part * 3 + 1, mask=inside, other=0.0).to(tl.float64)
        count += own
        total += own * mean
        start += MERGED
    number = tl.sum(count, 0)
    centre = tl.sum(total, 0) / tl.maximum(number, 1.0)
    spread = tl.zeros([MERGED], tl.float64)
    start = num_parts * 0
    while start < num_parts:
        part = start + lanes
        inside = part < num_parts
        own = tl.load(moments_ptr + part * 3, mask=inside, other=0.0).to(tl.float64)
        mean = tl.load(moments_ptr + part * 3 + 1, mask=inside, other=0.0).to(tl.float64)
        within = tl.load(moments_ptr + part * 3 + 2, mask=inside, other=0.0).to(tl.float64)
        spread += within + own * (mean - centre) * (mean - centre)
        start += MERGED
    variance = tl.sum(spread, 0) / tl.maximum(number - 1.0, 1.0)
    scale = 1.0 / tl.sqrt(variance + eps)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = at < num_values
    values = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
    white = (values.to(tl.float64) - centre) * scale
    if not SHIFT:
        white += centre
    if MASKED:
        white = tl.where(tl.load(mask_ptr + at, mask=live, other=0) != 0, white, 0.0)
    tl.store(out_ptr + at, white.to(tl.float32), mask=live)


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


def moments(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(count, mean, squared deviations) of each block of the kept values, float32 [P, 3]."""
    values = values.contiguous()
    blocks = -(-values.numel() // _BLOCK)
    out = torch.empty(blocks, 3, dtype=torch.float32, device=values.device)
    if blocks:
        kept = values if mask is None else mask.contiguous()
        _moments[(blocks,)](
            values, kept, out, values.numel(), MASKED=mask is not None, BLOCK=_BLOCK, num_warps=8
        )
    return out


def whiten(
    values: Tensor,
    parts: Tensor,
    *,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(values - mean) / sqrt(variance + eps) by the moments [P, 3]; float32, masked ones 0."""
    values = values.contiguous()
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    if values.numel():
        _whiten[(-(-values.numel() // _BLOCK),)](
            values,
            values if mask is None else mask.contiguous(),
            parts.contiguous(),
            out,
            values.numel(),
            parts.shape[0],
            eps,
            SHIFT=shift_mean,
            MASKED=mask is not None,
            BLOCK=_BLOCK,
            MERGED=_MERGED,
            num_warps=8,
        )
    return out


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
