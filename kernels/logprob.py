"""Log-probability (and entropy) of chosen tokens from logits, without a [T, V] temporary."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rlhfuse.kernels.reference import IGNORE_INDEX, TokenLogprob, accumulation_dtype
from rlhfuse.kernels.rows import fold_rows_, row_gradient_, scale_rows_

_CHUNK_ELEMENTS = 1 << 18  # a chunk of float32 rows stays in a core's cache


def token_logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    inplace_backward: bool = False,
) -> TokenLogprob:
    """log softmax(logits / temperature)[label] in float32, and the entropy if asked.

    Args:
        logits: [T, V], any float type; -inf marks a token that cannot occur.
        labels: [T], in [0, V) or `ignore_index`, where both results are 0.
        temperature: a number, or one per token [T]. No gradient flows to it.
        inplace_backward: the backward pass writes the gradient over `logits` (nothing else may
            need them then).

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_rows(logits, labels, temperature)
    marked = torch.where(labels == ignore_index, -1, labels.long())
    logprob, spread = _TokenLogprob.apply(  # type: ignore[no-untyped-call]
        logits, marked, temperature, entropy, inplace_backward
    )
    return TokenLogprob(logprob, spread if entropy else None)


def check_rows(rows: Tensor, labels: Tensor, temperature: float | Tensor) -> None:
    """Refuse rows [T, *], labels [T] and a temperature that do not fit together."""
    if rows.dim() != 2 or labels.shape != rows.shape[:1]:
        raise ValueError(
            f"expected rows [T, *] and labels [T], not {tuple(rows.shape)} and "
            f"{tuple(labels.shape)}"
        )
    if isinstance(temperature, Tensor) and temperature.shape != labels.shape:
        raise ValueError(
            f"temperature must be a number or one per token {tuple(labels.shape)}, "
            f"not {tuple(temperature.shape)}"
        )


def temperature_of(temperature: float | Tensor, rows: slice) -> float | Tensor:
    """The temperature of a range of rows."""
    return temperature[rows] if isinstance(temperature, Tensor) else temperature


def _row_chunks(num_rows: int, vocab: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(vocab, 1))
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def _copy(rows: Tensor, dtype: torch.dtype) -> Tensor:
    # Contiguous, because the order of a reduction follows the strides.
    return rows.to(dtype, copy=True, memory_format=torch.contiguous_format)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        temperature: float | Tensor,
        entropy: bool,
        inplace_backward: bool,
    ) -> tuple[Tensor, Tensor]:
        dtype = accumulation_dtype(logits)
        out = torch.empty(3, logits.shape[0], dtype=dtype, device=logits.device)
        for rows in _row_chunks(*logits.shape):
            scaled = scale_rows_(_copy(logits[rows], dtype), temperature_of(temperature, rows))
            fold = fold_rows_(scaled, labels[rows], entropy=entropy)
            out[0, rows], out[1, rows], out[2, rows] = fold.logprob, fold.entropy, fold.lse
        logprob, spread, lse = out.unbind(0)
        ctx.save_for_backward(logits, labels, lse, spread)
        ctx.temperature, ctx.entropy, ctx.inplace = temperature, entropy, inplace_backward
        return logprob.clone(), spread.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
        logits, labels, lse, spread = ctx.saved_tensors
        gradient = logits if ctx.inplace else torch.empty_like(logits)
        for rows in _row_chunks(*logits.shape):
            temperature = temperature_of(ctx.temperature, rows)
            scaled = scale_rows_(_copy(logits[rows], lse.dtype), temperature)
            by_scaled = row_gradient_(
                scaled,
                labels[rows],
                lse[rows],
                spread[rows],
                grad_logprob[rows],
                grad_entropy[rows] if ctx.entropy else None,
            )
            gradient[rows] = scale_rows_(by_scaled, temperature)
        return gradient, None, None, None, None
