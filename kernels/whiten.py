"""Mean and variance over many tokens, stable, and the same for any order of the sequences."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

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
    """Whiten over all tokens of a batch that is here as a whole; [T] -> [T].

    The gradient flows through mean and variance, too. Triton: one launch forward, one backward.
    """
    return _run(values, cu_seqlens, None, shift_mean, eps)


def whiten_masked(
    values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """Whiten over the kept values; the others become 0. Any shape, float32 (or float64).

    Gradient and launches as `whiten_batch`.
    """
    _check_mask(values, mask)
    return _run(values, None, mask, shift_mean, eps)


def _check_mask(values: Tensor, mask: Tensor) -> None:
    if values.shape != mask.shape:
        raise ValueError(
            f"values and mask must have one shape, not {tuple(values.shape)} and "
            f"{tuple(mask.shape)}"
        )


def _run(
    values: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None, shift_mean: bool, eps: float
) -> Tensor:
    kept = None if mask is None else mask.bool()
    # An operator's own price is more than that of a small batch.
    traced = torch.compiler.is_compiling()
    if traced or (values.requires_grad and torch.is_grad_enabled()):
        white: Tensor = whiten_op(values, cu_seqlens, kept, shift_mean, eps)[0]
        return white
    return _whiten(values, cu_seqlens, kept, shift_mean, eps)[0]


def _by_triton(values: Tensor) -> bool:
    return accumulation_dtype(values) == torch.float32 and choose(values.device) is Path.TRITON


def _white_dtype(values: Tensor, mask: Tensor | None) -> torch.dtype:
    return values.dtype if mask is None else accumulation_dtype(values)


def _whiten(
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    shift_mean: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Whiten all of packed sequences, or what a mask keeps (float32 at least); and what the
    backward pass needs: of Triton's, count, mean and scale, else nothing."""
    path, nothing = choose(values.device), values.new_empty(0, dtype=torch.float64)
    values = values.contiguous()
    if _by_triton(values):
        from rlhfuse.kernels import triton_whiten  # triton is optional

        if cu_seqlens is not None:
            check_packed(cu_seqlens, values.numel())
        with torch.no_grad():
            white, seen = triton_whiten.whiten(values, mask=mask, shift_mean=shift_mean, eps=eps)
            return white.to(_white_dtype(values, mask)), seen
    if values.numel() == 0:
        return torch.zeros_like(values, dtype=_white_dtype(values, mask)), nothing
    if cu_seqlens is not None and path is Path.COMPILED and values.dtype in _SUMMED:
        from rlhfuse.kernels import compiled_scans  # numba is slow to import

        if cu_seqlens.dim() == 1 and cu_seqlens.numel():
            whole = compiled_scans.whiten_batch(values, cu_seqlens, shift_mean=shift_mean, eps=eps)
            if whole is not None:
                return whole, nothing
        check_packed(cu_seqlens, values.numel())  # says what is wrong with it
    with torch.no_grad():
        return _whiten_plainly(values, cu_seqlens, mask, shift_mean, eps), nothing


def _whiten_plainly(
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    shift_mean: bool,
    eps: float,
) -> Tensor:
    if mask is None:
        assert cu_seqlens is not None
        return whiten(values, batch_moments(values, cu_seqlens), shift_mean=shift_mean, eps=eps)
    dtype = accumulation_dtype(values)
    chosen = values[mask].to(dtype)
    bounds = torch.tensor([0, chosen.numel()], device=values.device)
    white = torch.zeros_like(values, dtype=dtype)
    if chosen.numel():
        moments = batch_moments(chosen, bounds)
        white[mask] = whiten(chosen, moments, shift_mean=shift_mean, eps=eps)
    return white


whiten_op = torch.library.custom_op("rlhfuse::whiten", _whiten, mutates_args=())


@whiten_op.register_fake
def _(
    values: Tensor,
    cu_seqlens: Tensor | None,
    mask: Tensor | None,
    shift_mean: bool,
    eps: float,
) -> tuple[Tensor, Tensor]:
    white = values.new_empty(values.shape, dtype=_white_dtype(values, mask))
    return white, values.new_empty(3 if _by_triton(values) else 0, dtype=torch.float64)


@torch.library.custom_op("rlhfuse::whiten_backward", mutates_args=())
def _backward(
    values: Tensor,
    mask: Tensor | None,
    seen: Tensor,
    above: Tensor,
    shift_mean: bool,
    eps: float,
) -> Tensor:
    """Gradient by the values."""
    if _by_triton(values):
        from rlhfuse.kernels import triton_whiten  # triton is optional

        return triton_whiten.whiten_backward(values, mask, seen, above, shift_mean=shift_mean)
    live = torch.ones_like(values, dtype=torch.bool) if mask is None else mask
    wide, over = values.double(), torch.where(live, above.double(), 0.0)
    count = live.sum().double()
    mean = torch.where(live, wide, 0.0).sum() / count.clamp_min(1.0)
    centred = torch.where(live, wide - mean, 0.0)
    freedom = (count - 1.0).clamp_min(1.0)
    scale = (centred.square().sum() / freedom + eps).rsqrt()
    white = centred * scale
    level = over.sum() / count.clamp_min(1.0)
    # The mean and the deviation move with every value.
    gradient = (over - level - white * ((over * white).sum() / freedom)) * scale
    gradient = gradient if shift_mean else gradient + level
    gradient = torch.where(live, gradient, 0.0)
    return gradient.to(values.dtype, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(
    values: Tensor,
    mask: Tensor | None,
    seen: Tensor,
    above: Tensor,
    shift_mean: bool,
    eps: float,
) -> Tensor:
    return torch.empty_like(values, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, _, mask, ctx.shift_mean, ctx.eps = inputs
    ctx.save_for_backward(values, mask, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # zeros for the latter would be one more launch


def _autograd_backward(ctx: Any, above: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    assert above is not None, "what is not differentiable has asked for a gradient"
    return _backward(*ctx.saved_tensors, above, ctx.shift_mean, ctx.eps), None, None, None, None


whiten_op.register_autograd(_autograd_backward, setup_context=_setup_context)
