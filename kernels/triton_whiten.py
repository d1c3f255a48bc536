# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: moments, mean and variance, and whitening; no wait for a device.

Moments are (count, mean, squared deviations) of blocks, float64 [P, 3]: two passes inside a block,
merged in their order (Chan et al. 1979), so that neither the number of programs nor who comes first
changes a bit. Mean and variance are one launch, whose last program merges; whitening is one, whose
programs meet in between, and so is its backward pass. Where other ranks' moments come in between it
is two launches: `moments`, and `whiten` by all of them laid end to end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhfuse.kernels.triton_meet import counter, is_last, meet, options, side_by_side

_BLOCK = 2048
_MERGED = 256
_WARPS = 4  # of all: another number would add up a block in another order


@triton.jit
def moments_of(values, live):
    """Count, mean and squared deviations of the live ones of float32 `values`; float64."""
    count = tl.sum(live.to(tl.float32), 0)
    rough = tl.sum(tl.where(live, values, 0.0), 0) / tl.maximum(count, 1.0)
    centred = tl.where(live, values - rough, 0.0)
    # What rounding took from the mean is added again in double precision.
    off = tl.sum(centred, 0) / tl.maximum(count, 1.0)
    spread = tl.sum(centred * centred, 0) - count * off * off
    mean = rough.to(tl.float64) + off.to(tl.float64)
    return count.to(tl.float64), mean, tl.maximum(spread, 0.0).to(tl.float64)


@triton.jit
def _load(values_ptr, mask_ptr, block, num_values, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(positions, which of them exist, which are kept, float32 values) of a block."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_values
    live = inside
    if MASKED:
        live = inside & (tl.load(mask_ptr + at, mask=inside, other=0) != 0)
    values = tl.load(values_ptr + at, mask=live, other=0.0).to(tl.float32)
    return at, inside, live, values


@triton.jit
def _leave_moments(
    values_ptr, mask_ptr, parts_ptr, block, num_values, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    _, _, live, values = _load(values_ptr, mask_ptr, block, num_values, MASKED, BLOCK)
    count, mean, spread = moments_of(values, live)
    tl.store(parts_ptr + block * 3, count)
    tl.store(parts_ptr + block * 3 + 1, mean)
    tl.store(parts_ptr + block * 3 + 2, spread)


@triton.jit
def _merge(parts_ptr, num_parts, MERGED: tl.constexpr):
    """(count, mean, squared deviations) of all parts: they are few, and in the second cache (the
    first may hold what stood there before)."""
    lanes = tl.arange(0, MERGED)
    count = tl.zeros([MERGED], tl.float64)
    total = tl.zeros([MERGED], tl.float64)
    start = num_parts * 0
    while start < num_parts:
        part = parts_ptr + (start + lanes) * 3
        inside = start + lanes < num_parts
        own = tl.load(part, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        mean = tl.load(part + 1, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        count += own
        total += own * mean
        start += MERGED
    number = tl.sum(count, 0)
    centre = tl.sum(total, 0) / tl.maximum(number, 1.0)
    spread = tl.zeros([MERGED], tl.float64)
    start = num_parts * 0
    while start < num_parts:
        part = parts_ptr + (start + lanes) * 3
        inside = start + lanes < num_parts
        own = tl.load(part, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        mean = tl.load(part + 1, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        within = tl.load(part + 2, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float64)
        spread += within + own * (mean - centre) * (mean - centre)
        start += MERGED
    return number, centre, tl.sum(spread, 0)


@triton.jit
def _split(number):
    """A float64 in two float32 parts: as exact as double precision, and cheap on every GPU."""
    high = number.to(tl.float32)
    return high, (number - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _store_white(
    values_ptr, mask_ptr, out_ptr, block, num_values, high, low, scale,
    SHIFT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside, live, values = _load(values_ptr, mask_ptr, block, num_values, MASKED, BLOCK)
    white = ((values - high) - low) * scale
    if not SHIFT:
        white += high
    tl.store(out_ptr + at, tl.where(live, white, 0.0), mask=inside)


@triton.jit(do_not_specialize=["num_values"])
def _moments(
    values_ptr, mask_ptr, parts_ptr, num_values, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    _leave_moments(values_ptr, mask_ptr, parts_ptr, tl.program_id(0), num_values, MASKED, BLOCK)


@triton.jit(do_not_specialize=["num_values", "num_parts"])
def _statistics(
    values_ptr, mask_ptr, parts_ptr, counter_ptr, out_ptr, num_values, num_parts,
    MASKED: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    _leave_moments(values_ptr, mask_ptr, parts_ptr, tl.program_id(0), num_values, MASKED, BLOCK)
    if is_last(counter_ptr):
        count, mean, spread = _merge(parts_ptr, num_parts, MERGED)
        tl.store(out_ptr, count)
        tl.store(out_ptr + 1, mean)
        tl.store(out_ptr + 2, spread / tl.maximum(count - 1.0, 1.0))


@triton.jit(do_not_specialize=["num_values"])
def _statistics_backward(
    values_ptr, mask_ptr, statistics_ptr, above_ptr, gradient_ptr, num_values,
    MASKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside, live, values = _load(
        values_ptr, mask_ptr, tl.program_id(0), num_values, MASKED, BLOCK
    )
    count = tl.load(statistics_ptr)
    high, low = _split(tl.load(statistics_ptr + 1))
    level = (tl.load(above_ptr + 1) / tl.maximum(count, 1.0)).to(tl.float32)
    slope = (2.0 * tl.load(above_ptr + 2) / tl.maximum(count - 1.0, 1.0)).to(tl.float32)
    gradient = level + ((values - high) - low) * slope
    tl.store(gradient_ptr + at, tl.where(live, gradient, 0.0), mask=inside)


@triton.jit(do_not_specialize=["num_values", "num_parts", "eps"])
def _whiten(
    values_ptr, mask_ptr, parts_ptr, counter_ptr, statistics_ptr, out_ptr,
    num_values, num_parts, eps,
    GIVEN: tl.constexpr, SHIFT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
):  # fmt: skip
    blocks = (num_values + BLOCK - 1) // BLOCK
    block = tl.program_id(0)
    if not GIVEN:
        while block < blocks:
            _leave_moments(values_ptr, mask_ptr, parts_ptr, block, num_values, MASKED, BLOCK)
            block += tl.num_programs(0)
        meet(counter_ptr)
    count, centre, spread = _merge(parts_ptr, num_parts, MERGED)
    variance = spread / tl.maximum(count - 1.0, 1.0) + eps
    scale = tl.rsqrt(variance.to(tl.float32)).to(tl.float64)
    scale *= 1.5 - 0.5 * variance * scale * scale  # Newton's step: double precision's digits
    if tl.program_id(0) == 0:
        tl.store(statistics_ptr, count)
        tl.store(statistics_ptr + 1, centre)
        tl.store(statistics_ptr + 2, scale)
    high, low = _split(centre)
    factor = scale.to(tl.float32)
    block = tl.program_id(0)
    while block < blocks:
        _store_white(
            values_ptr, mask_ptr, out_ptr, block, num_values, high, low, factor,
            SHIFT, MASKED, BLOCK,
        )  # fmt: skip
        block += tl.num_programs(0)


@triton.jit(do_not_specialize=["num_values", "num_parts"])
def _whiten_backward(
    values_ptr, mask_ptr, statistics_ptr, above_ptr, parts_ptr, counter_ptr, gradient_ptr,
    num_values, num_parts,
    SHIFT: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    count = tl.load(statistics_ptr)
    high, low = _split(tl.load(statistics_ptr + 1))
    scale = tl.load(statistics_ptr + 2).to(tl.float32)
    block = tl.program_id(0)
    while block < num_parts:
        at, _, live, values = _load(values_ptr, mask_ptr, block, num_values, MASKED, BLOCK)
        above = tl.load(above_ptr + at, mask=live, other=0.0).to(tl.float32)
        white = ((values - high) - low) * scale
        tl.store(parts_ptr + block * 2, tl.sum(above, 0).to(tl.float64))
        tl.store(parts_ptr + block * 2 + 1, tl.sum(above * white, 0).to(tl.float64))
        block += tl.num_programs(0)
    meet(counter_ptr)
    lanes = tl.arange(0, MERGED)
    total = tl.zeros([MERGED], tl.float64)
    along = tl.zeros([MERGED], tl.float64)
    start = num_parts * 0
    while start < num_parts:
        part = parts_ptr + (start + lanes) * 2
        inside = start + lanes < num_parts
        total += tl.load(part, mask=inside, other=0.0, cache_modifier=".cg")
        along += tl.load(part + 1, mask=inside, other=0.0, cache_modifier=".cg")
        start += MERGED
    # The mean and the deviation move with every value.
    level = (tl.sum(total, 0) / tl.maximum(count, 1.0)).to(tl.float32)
    tilt = (tl.sum(along, 0) / tl.maximum(count - 1.0, 1.0)).to(tl.float32)
    block = tl.program_id(0)
    while block < num_parts:
        at, inside, live, values = _load(values_ptr, mask_ptr, block, num_values, MASKED, BLOCK)
        above = tl.load(above_ptr + at, mask=live, other=0.0).to(tl.float32)
        white = ((values - high) - low) * scale
        gradient = scale * ((above - level) - white * tilt)
        if not SHIFT:
            gradient += level
        tl.store(gradient_ptr + at, tl.where(live, gradient, 0.0), mask=inside)
        block += tl.num_programs(0)


def _kept(values: Tensor, mask: Tensor | None) -> Tensor:
    """What stands for the mask: without one, memory that nobody reads."""
    return values if mask is None else mask.contiguous()


def _blocks(values: Tensor) -> int:
    return -(-values.numel() // _BLOCK)


def moments(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """(count, mean, squared deviations) of each block of the kept values, float64 [P, 3]."""
    values, blocks = values.contiguous(), _blocks(values)
    parts = torch.empty(blocks, 3, dtype=torch.float64, device=values.device)
    if blocks:
        _moments[(blocks,)](
            values, _kept(values, mask), parts, values.numel(),
            MASKED=mask is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return parts


def statistics(values: Tensor, mask: Tensor | None = None) -> Tensor:
    """Count, mean and unbiased variance of the kept values, float64 [3]; zeros for none."""
    values, blocks = values.contiguous(), _blocks(values)
    if not blocks:
        return torch.zeros(3, dtype=torch.float64, device=values.device)
    parts = torch.empty(blocks, 3, dtype=torch.float64, device=values.device)
    out = torch.empty(3, dtype=torch.float64, device=values.device)
    _statistics[(blocks,)](
        values, _kept(values, mask), parts, counter(values.device), out, values.numel(), blocks,
        MASKED=mask is not None, BLOCK=_BLOCK, MERGED=_MERGED, num_warps=_WARPS,
    )  # fmt: skip
    return out


def statistics_backward(
    values: Tensor, mask: Tensor | None, statistics: Tensor, above: Tensor
) -> Tensor:
    """Gradient by the values, in their type; statistics and above: float64 [3]."""
    values, blocks = values.contiguous(), _blocks(values)
    gradient = torch.empty_like(values)
    if blocks:
        _statistics_backward[(blocks,)](
            values, _kept(values, mask), statistics, above.contiguous(), gradient, values.numel(),
            MASKED=mask is not None, BLOCK=_BLOCK, num_warps=_WARPS,
        )  # fmt: skip
    return gradient


def whiten(
    values: Tensor,
    parts: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """(values - mean) / sqrt(variance + eps), float32, masked ones 0; and count, mean and
    1 / sqrt(variance + eps), float64 [3].

    By the moments [P, 3] where they are given, else by the values' own, in the same launch.
    """
    values, blocks = values.contiguous(), _blocks(values)
    out = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    seen = torch.zeros if not blocks else torch.empty
    statistics = seen(3, dtype=torch.float64, device=values.device)
    if not blocks:
        return out, statistics
    given = parts is not None
    if parts is None:
        parts = torch.empty(blocks, 3, dtype=torch.float64, device=values.device)
    programs = blocks if given else min(blocks, side_by_side(values.device))
    _whiten[(programs,)](
        values, _kept(values, mask), parts.contiguous(),
        statistics if given else counter(values.device), statistics, out,
        values.numel(), parts.shape[0], eps,
        GIVEN=given, SHIFT=shift_mean, MASKED=mask is not None, BLOCK=_BLOCK, MERGED=_MERGED,
        **({"num_warps": _WARPS} if given else options()),
    )  # fmt: skip
    return out, statistics


def whiten_backward(
    values: Tensor, mask: Tensor | None, statistics: Tensor, above: Tensor, *, shift_mean: bool
) -> Tensor:
    """Gradient by the values, in their type: also through the mean and the variance."""
    values, blocks = values.contiguous(), _blocks(values)
    gradient = torch.empty_like(values)
    if blocks:
        _whiten_backward[(min(blocks, side_by_side(values.device)),)](
            values, _kept(values, mask), statistics, above.contiguous(),
            torch.empty(blocks, 2, dtype=torch.float64, device=values.device),
            counter(values.device), gradient, values.numel(), blocks,
            SHIFT=shift_mean, MASKED=mask is not None, BLOCK=_BLOCK, MERGED=_MERGED,
            **options(),
        )  # fmt: skip
    return gradient
