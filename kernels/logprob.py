"""Log-probability (and entropy) of chosen tokens from logits, without a [T, V] temporary."""

from typing import Any

import torch
from torch import Tensor

from rlhfuse.kernels import reference
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.fresh import fresh
from rlhfuse.kernels.reference import IGNORE_INDEX, TokenLogprob, accumulation_dtype
from rlhfuse.kernels.rows import RowFold, Temperatures, fold_rows, row_gradient


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
        temperature: a number, or one per token [T] (of sequences: `packed.expand` gives each token
            its sequence's). No gradient flows to it.
        inplace_backward: the backward pass writes the gradient over `logits` (nothing else may
            need them then; not under torch.compile).

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_rows(logits, labels, temperature)
    marked = torch.where(labels == ignore_index, -1, labels.long())
    if choose(logits.device) is Path.REFERENCE:
        return reference.token_logprob(
            logits, labels, temperature=temperature, entropy=entropy, ignore_index=ignore_index
        )
    number, per_token = split_temperature(temperature, logits)
    logprob, spread, _ = token_logprob_op(
        logits, marked, number, per_token, entropy, inplace_backward
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


def split_temperature(temperature: float | Tensor, like: Tensor) -> tuple[float, Tensor | None]:
    """As an operator takes it: a number (1 where there are many), and one per token or None.

    like: [T, *], the rows. A graph would be traced again for every number that an operator is
    given, so under torch.compile there is one per token.
    """
    if isinstance(temperature, Tensor):
        return 1.0, temperature
    if torch.compiler.is_compiling():
        # float64, as the number is: results keep their bits.
        ones = torch.ones(like.shape[0], dtype=torch.float64, device=like.device)
        return 1.0, ones * temperature
    return float(temperature), None


@torch.library.custom_op("rlhfuse::token_logprob", mutates_args=())
def token_logprob_op(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Logprob [T], entropy [T], and what was taken off each row and its sum of exponentials,
    [2, T], for the backward pass."""
    dtype = accumulation_dtype(logits)
    if dtype == torch.float32 and choose(logits.device) is Path.TRITON:
        from rlhfuse.kernels import triton_logprob  # triton is optional

        logprob, spread = (torch.empty_like(labels, dtype=dtype) for _ in range(2))
        saved = torch.zeros(2, labels.numel(), dtype=dtype, device=logits.device)
        triton_logprob.forward(
            logits, labels, temperature, temperatures, entropy, logprob, spread, saved
        )
        return logprob, spread, saved
    given = Temperatures(temperature, temperatures)
    fold = fold_rows(logits, labels, slice(0, labels.numel()), given, entropy=entropy)
    return fold.logprob.clone(), fold.entropy.clone(), torch.stack([fold.shift, fold.total])


@token_logprob_op.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    inplace_backward: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(logits)
    rows = logits.shape[0]
    return (
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(rows, dtype=dtype),
        logits.new_empty(2, rows, dtype=dtype),
    )


@torch.library.custom_op("rlhfuse::token_logprob_backward", mutates_args=())
def _backward(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    spread: Tensor,
    saved: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    gradient = fresh(*logits.shape, like=logits)
    _write_gradient(
        logits, labels, temperature, temperatures, spread, saved, grad_logprob, grad_entropy,
        gradient,
    )  # fmt: skip
    return gradient


@_backward.register_fake
def _(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    spread: Tensor,
    saved: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _write_gradient(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    spread: Tensor,
    saved: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    gradient: Tensor,
) -> None:
    """Write the gradient by `logits` into `gradient`, which may be `logits` itself."""
    if saved.dtype == torch.float32 and choose(logits.device) is Path.TRITON:
        from rlhfuse.kernels import triton_logprob  # triton is optional

        triton_logprob.backward(
            logits, labels, temperature, temperatures, spread, saved, grad_logprob, grad_entropy,
            gradient,
        )  # fmt: skip
        return
    row_gradient(
        logits, labels, RowFold(spread, spread, *saved.unbind()), grad_logprob, grad_entropy,
        slice(0, labels.numel()), Temperatures(temperature, temperatures), gradient,
    )  # fmt: skip


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, labels, ctx.temperature, temperatures, ctx.entropy, ctx.inplace = inputs
    ctx.save_for_backward(logits, labels, temperatures, output[1], output[2])


def _autograd_backward(
    ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor, _: Tensor
) -> tuple[Any, ...]:
    logits, labels, temperatures, spread, saved = ctx.saved_tensors
    by_entropy = grad_entropy if ctx.entropy else None
    arguments = (labels, ctx.temperature, temperatures, spread, saved, grad_logprob, by_entropy)
    if ctx.inplace:
        gradient = logits.detach()
        _write_gradient(logits, *arguments, gradient)
    else:
        gradient = _backward(logits, *arguments)
    return gradient, None, None, None, None, None


token_logprob_op.register_autograd(_autograd_backward, setup_context=_setup_context)
