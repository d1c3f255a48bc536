"""Mean and variance over many tokens, stable, and the same for any order of the sequences."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfuse.kernels.packed import check_packed, expand, lengths, segment_sum


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
    scale = 1.0 / math.sqrt(moments.variance + eps)
    white = (values - moments.mean) * scale
    return white if shift_mean else white + moments.mean


def batch_moments(values: Tensor, cu_seqlens: Tensor) -> Moments:
    """Moments of a batch that is here as a whole, in two passes; [T] -> one.

    Sums run inside each sequence and are then added exactly: same bits for every order of the
    sequences. (To rounding, not to the bit, this is the pool of `sequence_moments`.)
    """
    check_packed(cu_seqlens, values.numel())
    count = values.numel()
    if count == 0:
        return Moments(0, 0.0, 0.0)
    mean = math.fsum(segment_sum(values, cu_seqlens).tolist()) / count
    centred = values.double().sub_(mean)
    return Moments(count, mean, math.fsum(segment_sum(centred.square_(), cu_seqlens).tolist()))


def whiten_batch(values: Tensor, cu_seqlens: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Whiten over all tokens of a batch that is here as a whole; [T] -> [T]."""
    if values.numel() == 0:
        return torch.zeros_like(values)
    return whiten(values, batch_moments(values, cu_seqlens), shift_mean=shift_mean)
