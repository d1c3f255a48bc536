"""Mean and variance over many tokens, stable, and the same for any order of the sequences."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.packed import check_packed, expand, lengths, segment_sum
from rlhfuse.kernels.reference import accumulation_dtype

_SUMMED = (torch.float32, torch.float64)


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
    added = 0.0 if shift_mean else moments.mean
    if choose(values.device) is Path.COMPILED and accumulation_dtype(values) == values.dtype:
        from rlhfuse.kernels import compiled_scans  # numba is slow to import

        return compiled_scans.whiten(values, moments.mean, scale, added)
    # Far from 0 the mean does not fit a float32 well enough.
    wide = values.double() if abs(moments.mean) * scale > 8.0 else values
    return ((wide - moments.mean) * scale + added).to(values.dtype)


def batch_moments(values: Tensor, cu_seqlens: Tensor) -> Moments:
    """Moments of a batch that is here as a whole; [T] -> one.

    The same bits for every order of the sequences (to rounding, not to the bit, this is the pool
    of `sequence_moments`).
    """
    check_packed(cu_seqlens, values.numel())
    if values.numel() == 0:
        return Moments(0, 0.0, 0.0)
    if choose(values.device) is not Path.COMPILED:
        return pool(sequence_moments(values, cu_seqlens))
    from rlhfuse.kernels import compiled_scans  # numba is slow to import

    kept = values.to(accumulation_dtype(values))
    return Moments(values.numel(), *compiled_scans.moments(kept, cu_seqlens))


def whiten_batch(
    values: Tensor, cu_seqlens: Tensor, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Whiten over all tokens of a batch that is here as a whole; [T] -> [T]."""
    run = whiten_op if torch.compiler.is_compiling() else _whiten
    white: Tensor = run(values, cu_seqlens, None, shift_mean, eps)
    return white


def whiten_masked(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Whiten over the kept values; the others become 0. Any shape, float32 (or float64)."""
    if values.shape != mask.shape:
        raise ValueError(
            f"values and mask must have one shape, not {tuple(values.shape)} and "
            f"{tuple(mask.shape)}"
        )
    run = whiten_op if torch.compiler.is_compiling() else _whiten
    white: Tensor = run(values, None, mask, shift_mean, eps)
    return white


def _whiten(
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    shift_mean: bool,
    eps: float,
) -> Tensor:
    """Whiten all of packed sequences, or what a mask keeps (float32 at least). No gradient."""
    if values.numel() == 0:
        return torch.zeros_like(
            values, dtype=values.dtype if mask is None else accumulation_dtype(values)
        )
    path = choose(values.device)
    if cu_seqlens is not None and path is Path.COMPILED and values.dtype in _SUMMED:
        from rlhfuse.kernels import compiled_scans  # numba is slow to import

        if cu_seqlens.dim() == 1 and cu_seqlens.numel():
            white = compiled_scans.whiten_batch(values, cu_seqlens, shift_mean=shift_mean, eps=eps)
            if white is not None:
                return white
        check_packed(cu_seqlens, values.numel())  # says what is wrong with it
    with torch.no_grad():
        return _whiten_plainly(values, cu_seqlens, mask, shift_mean, eps)


def _whiten_plainly(
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    shift_mean: bool,
    eps: float,
) -> Tensor:
    dtype, kept = accumulation_dtype(values), None if mask is None else mask.bool()
    if dtype == torch.float32 and choose(values.device) is Path.TRITON:
        from rlhfuse.kernels import triton_whiten  # triton is optional

        parts = triton_whiten.moments(values, kept)
        white = triton_whiten.whiten(values, parts, mask=kept, shift_mean=shift_mean, eps=eps)
        return white.to(values.dtype) if kept is None else white
    if kept is None:
        assert cu_seqlens is not None
        return whiten(values, batch_moments(values, cu_seqlens), shift_mean=shift_mean, eps=eps)
    chosen = values[kept].to(dtype)
    bounds = torch.tensor([0, chosen.numel()], device=values.device)
    white = torch.zeros_like(values, dtype=dtype)
    if chosen.numel():
        moments = batch_moments(chosen, bounds)
        white[kept] = whiten(chosen, moments, shift_mean=shift_mean, eps=eps)
    return white


whiten_op = torch.library.custom_op("rlhfuse::whiten", _whiten, mutates_args=())


@whiten_op.register_fake
def _(
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    shift_mean: bool,
    eps: float,
) -> Tensor:
    return torch.empty_like(
        values, dtype=values.dtype if mask is None else accumulation_dtype(values)
    )
