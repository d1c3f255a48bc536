"""Mean and variance over many tokens, stable, and the same for any order of the sequences."""

import math
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.packed import check_packed, expand, lengths, segment_sum
from rlhfuse.kernels.reference import accumulation_dtype

_CACHED = 1 << 15  # numbers of float64 that stay in cache


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of a set of values; float64's accuracy."""

    count: int
    mean: float
    deviation: float

    @property
    def variance(self) -> float:
        """Unbiased (divisor n - 1); 0 for fewer than two values."""
        return self.deviation / (self.count - 1) if self.count > 1 else 0.0


def sequence_moments(values: Tensor, cu_seqlens: Tensor) -> list[Moments]:
    """Moments of each packed sequence, in two passes over float64; [T] -> N of them."""
    check_packed(cu_seqlens, values.numel())
    counts = lengths(cu_seqlens)
    means = segment_sum(values, cu_seqlens) / counts.clamp_min(1)
    centred = values.double() - expand(means, cu_seqlens, values.numel())
    deviations = segment_sum(centred.square(), cu_seqlens)
    rows = zip(counts.tolist(), means.tolist(), deviations.tolist(), strict=True)
    return [Moments(count, mean, deviation) for count, mean, deviation in rows]


def pool(parts: Iterable[Moments]) -> Moments:
    """Moments of the union (Chan et al. 1979), the same bits for every order of the parts.

    For sequences that lie on several ranks: exchange their `sequence_moments` and pool all of
    them at once, which gives the same bits everywhere (a pool of pools only to rounding).
    """
    kept = [part for part in parts if part.count]
    count = sum(part.count for part in kept)
    if count == 0:
        return Moments(0, 0.0, 0.0)
    mean = math.fsum(part.count * part.mean for part in kept) / count
    deviation = math.fsum(
        term for part in kept for term in (part.deviation, part.count * (part.mean - mean) ** 2)
    )
    return Moments(count, mean, deviation)


def whiten(
    values: Tensor, moments: Moments, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """(values - mean) / sqrt(variance + eps); without `shift_mean` the mean is added back.

    Raises:
        ValueError: the moments are those of no values.
    """
    if moments.count == 0:
        raise ValueError("cannot whiten by the moments of no values: the batch has no tokens")
    spread = math.sqrt(moments.variance + eps)
    # Far from 0 the mean does not fit a float32 well enough.
    far = abs(moments.mean) > 8.0 * spread
    if not far and shift_mean and _few(values):
        small = values.numpy() - moments.mean
        small *= 1.0 / spread
        return torch.from_numpy(small)
    wide = values.double() if far else values
    white = (wide - moments.mean).mul_(1.0 / spread)
    if not shift_mean:
        white.add_(moments.mean)
    return white if white.dtype == values.dtype else white.to(values.dtype)


def _few(values: Tensor) -> bool:
    """Whether numpy is faster, to the same bits: half torch's price per call, on one thread."""
    on_cpu = values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
    return on_cpu and 0 < values.numel() <= _CACHED and not values.requires_grad


def batch_moments(values: Tensor, cu_seqlens: Tensor) -> Moments:
    """Moments of a batch that is here as a whole; [T] -> one.

    Float64 sums of values and squares inside each sequence, then added exactly: same bits for
    every order of the sequences. Where subtracting the mean's square would cancel more than 20 of
    the 53 bits, a second pass sums the squares about the mean. (To rounding, not to the bit, this
    is the pool of `sequence_moments`.)
    """
    check_packed(cu_seqlens, values.numel())
    count = values.numel()
    if count == 0:
        return Moments(0, 0.0, 0.0)
    total, squares = _power_sums(values, cu_seqlens, 0.0)
    mean = total / count
    deviation = squares - total * mean
    if not deviation > 2.0**-20 * squares:
        deviation = _power_sums(values, cu_seqlens, mean)[1]
    return Moments(count, mean, deviation)


def whiten_batch(
    values: Tensor, cu_seqlens: Tensor, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Whiten over all tokens of a batch that is here as a whole; [T] -> [T]."""
    if values.numel() == 0:
        return torch.zeros_like(values)
    if accumulation_dtype(values) == torch.float32 and choose(values.device) is Path.TRITON:
        from rlhfuse.kernels import triton_whiten  # triton is optional

        parts = triton_whiten.moments(values)
        white = triton_whiten.whiten(values, parts, shift_mean=shift_mean, eps=eps)
        return white.to(values.dtype)
    moments = batch_moments(values, cu_seqlens)
    return whiten(values, moments, shift_mean=shift_mean, eps=eps)


def whiten_masked(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Whiten over the kept values; the others become 0. Any shape, float32 (or float64)."""
    if values.shape != mask.shape:
        raise ValueError(
            f"values and mask must have one shape, not {tuple(values.shape)} and "
            f"{tuple(mask.shape)}"
        )
    dtype, kept = accumulation_dtype(values), mask.bool()
    if dtype == torch.float32 and choose(values.device) is Path.TRITON:
        from rlhfuse.kernels import triton_whiten  # triton is optional

        parts = triton_whiten.moments(values, kept)
        return triton_whiten.whiten(values, parts, mask=kept, shift_mean=shift_mean, eps=eps)
    chosen = values[kept].to(dtype)
    bounds = torch.tensor([0, chosen.numel()], device=values.device)
    white = torch.zeros_like(values, dtype=dtype)
    white[kept] = whiten_batch(chosen, bounds, shift_mean=shift_mean, eps=eps)
    return white


def _power_sums(values: Tensor, cu_seqlens: Tensor, shift: float) -> tuple[float, float]:
    """Sums of (values - shift) and of its square."""
    if values.device.type != "cpu":
        wide = values.double() - shift
        power_sums = [segment_sum(part, cu_seqlens).tolist() for part in (wide, wide.square())]
        return math.fsum(power_sums[0]), math.fsum(power_sums[1])
    given = values.detach().to(accumulation_dtype(values)).numpy()
    bounds = cu_seqlens.numpy()
    bounds = bounds[:-1][bounds[1:] > bounds[:-1]]  # where the occupied sequences begin
    count = values.numel()
    if count <= _CACHED:
        parts = [(0, len(bounds), 0, count)]
    else:
        parts = _in_cache([*bounds.tolist(), count])
    sums: list[float] = []
    squares: list[float] = []
    room = np.empty(max(stop - start for _, _, start, stop in parts))
    for first, last, start, stop in parts:
        starts = bounds[first:last] - start if start else bounds[first:last]
        own = room[: stop - start]
        own[:] = given[start:stop]
        if shift:
            own -= shift
        sums.extend(np.add.reduceat(own, starts).tolist())
        np.multiply(own, own, out=own)
        squares.extend(np.add.reduceat(own, starts).tolist())
    return math.fsum(sums), math.fsum(squares)


def _in_cache(bounds: list[int]) -> list[tuple[int, int, int, int]]:
    """Whole sequences together, of at most `_CACHED` tokens or one sequence: (first, last, start,
    stop), the sequences and then the tokens."""
    parts, first, last = [], 0, len(bounds) - 1
    while first < last:
        until = max(first + 1, bisect_right(bounds, bounds[first] + _CACHED) - 1)
        parts.append((first, until, bounds[first], bounds[until]))
        first = until
    return parts
