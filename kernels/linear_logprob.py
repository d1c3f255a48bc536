"""Log-probability (and entropy) of chosen tokens from hidden states and the LM head.

Works through the tokens in chunks, so that [T, V] never exists, and keeps logits in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from rlhfuse.kernels import reference
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.fresh import fresh
from rlhfuse.kernels.head_chunks import (
    add_weight_gradient_,
    chunk_room,
    chunk_rows,
    chunks,
    head_logits,
    weight_room,
)
from rlhfuse.kernels.kept import KeptRows, check_kept, fold_kept, kept_gradient
from rlhfuse.kernels.logprob import check_rows, split_temperature
from rlhfuse.kernels.precision import autocast_inputs, without_autocast
from rlhfuse.kernels.reference import IGNORE_INDEX, KeptTokens, TokenLogprob, accumulation_dtype
from rlhfuse.kernels.rows import RowFold, Temperatures, fold_rows, row_gradient
from rlhfuse.kernels.vocab_parallel import VocabParallelLogprob


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    keep_logits_bytes: int = 64 << 20,
    kept: KeptTokens | None = None,
    tp_group: ProcessGroup | None = None,
) -> TokenLogprob:
    """`token_logprob` of ``hidden @ weight.T + bias`` in O(T + chunk) memory.

    A token's result does not depend on the other tokens: chunks have fixed sizes, and no matrix
    product has fewer than 16 rows. The backward pass computes the logits of a chunk again, apart
    from the first `keep_logits_bytes` of them, which are kept (same bits, one product less).

    Args:
        hidden: [T, H]. weight: [V, H] (may be tied). bias: [V] or None.
        labels: [T], in [0, V) or `ignore_index`, where both results are 0.
        temperature: a number, or one per token [T]. No gradient flows to it.
        kept: renormalise over the tokens that the sampler kept at each position, so that trainer
            and sampler speak of one distribution. Labels must be among them.
        tp_group: every rank of it calls this with the same hidden states and labels, and with its
            own rows of weight and bias (parts of the vocabulary, in rank order; labels count
            through all of them). Results and the gradient by hidden are whole on every rank.

    Under autocast the two factors are narrowed to its type, logits never. torch.compile takes it
    as one operator, except with `tp_group` (a break in the graph).

    Raises:
        ValueError: shapes that do not fit together, a label that `kept` does not have, or `kept`
            with a cut vocabulary.
    """
    check_rows(hidden, labels, temperature)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[1]}] for hidden {tuple(hidden.shape)}, "
            f"not {tuple(weight.shape)}"
        )
    hidden, weight, bias = autocast_inputs(hidden, weight, bias)
    if tp_group is not None and tp_group.size() > 1:
        cut: TokenLogprob = _vocab_parallel(
            hidden, weight, labels, bias, temperature, entropy, ignore_index, kept, tp_group
        )
        return cut
    marked = torch.where(labels == ignore_index, -1, labels.long())
    if kept is not None and not torch.compiler.is_compiling():
        check_kept(kept, marked)
    if choose(hidden.device) is Path.REFERENCE:
        with without_autocast(hidden):
            return reference.linear_logprob(
                hidden, weight, labels, bias=bias, temperature=temperature, entropy=entropy,
                ignore_index=ignore_index, kept=kept,
            )  # fmt: skip
    ids, cu = (None, None) if kept is None else (kept.ids, kept.cu)
    needed = hidden.requires_grad or weight.requires_grad
    needed = needed or (bias is not None and bias.requires_grad)
    room = keep_logits_bytes if needed and torch.is_grad_enabled() else 0
    keep_rows = _rows_within(room, hidden, weight.shape[0])
    logprob, spread, _, _ = linear_logprob_op(
        hidden,
        weight,
        bias,
        marked,
        *split_temperature(temperature, hidden),
        entropy,
        keep_rows,
        ids,
        cu,
    )
    return TokenLogprob(logprob, spread if entropy else None)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _vocab_parallel(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    temperature: float | Tensor,
    entropy: bool,
    ignore_index: int,
    kept: KeptTokens | None,
    group: ProcessGroup,
) -> TokenLogprob:
    if kept is not None:
        raise ValueError(
            "kept tokens with a tp_group are not supported: gather the head first, or leave "
            "one of the two out"
        )
    marked = torch.where(labels == ignore_index, -1, labels.long())
    with without_autocast(hidden):
        logprob, spread = VocabParallelLogprob.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, marked, *split_temperature(temperature, hidden), group
        )
    return TokenLogprob(logprob, spread if entropy else None)


def _by_triton(hidden: Tensor) -> bool:
    return accumulation_dtype(hidden) == torch.float32 and choose(hidden.device) is Path.TRITON


def _rows_within(room: int, hidden: Tensor, vocab: int) -> int:
    """How many rows of logits, in whole chunks, the forward pass leaves for the backward pass."""
    if room <= 0 or _by_triton(hidden):
        return 0
    # Without a loop over the chunks, for which torch.compile would trace a graph per length.
    fitting = room // (max(vocab, 1) * accumulation_dtype(hidden).itemsize)
    step = chunk_rows(vocab)
    return hidden.shape[0] if hidden.shape[0] <= fitting else fitting // step * step


@torch.library.custom_op("rlhfuse::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    keep_rows: int,
    kept_ids: Tensor | None,
    kept_cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logprob [T], entropy [T]; what was taken off each row and its sum of exponentials [2, T], and
    logits [keep_rows, V], for the backward pass."""
    dtype, given = accumulation_dtype(hidden), Temperatures(temperature, temperatures)
    kept = fresh(keep_rows, weight.shape[0], like=hidden, dtype=dtype)
    if _by_triton(hidden):
        from rlhfuse.kernels import triton_kept, triton_linear  # triton is optional

        if kept_ids is None or kept_cu is None:
            folded = triton_linear.fold(hidden, weight, bias, labels, temperature, temperatures)
        else:
            source = triton_kept.Source(hidden, weight, bias, temperature, temperatures)
            folded = triton_kept.fold(source, labels, kept_ids, kept_cu)
        return folded[0].clone(), folded[1].clone(), folded[2:].clone(), kept
    out = torch.empty(4, hidden.shape[0], dtype=dtype, device=hidden.device)
    wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    room = chunk_room(out, hidden.shape[0] - keep_rows, weight.shape[0])
    with without_autocast(hidden):
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            block = kept[rows] if rows.stop <= keep_rows else room[: rows.stop - rows.start]
            logits = head_logits(hidden[rows].to(dtype), wide, wide_bias, block)
            if kept_ids is None or kept_cu is None:
                fold = fold_rows(logits, labels[rows], rows, given, entropy=entropy)
            else:
                own = KeptRows.of(kept_ids, kept_cu, rows)
                fold = fold_kept(logits, labels[rows], own, rows, given)
            out[:, rows] = torch.stack([fold.logprob, fold.entropy, fold.shift, fold.total])
    return out[0].clone(), out[1].clone(), out[2:].clone(), kept


@linear_logprob_op.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    keep_rows: int,
    kept_ids: Tensor | None,
    kept_cu: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = accumulation_dtype(hidden), hidden.shape[0]
    return (
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(rows, dtype=dtype),
        hidden.new_empty(2, rows, dtype=dtype),
        hidden.new_empty(keep_rows, weight.shape[0], dtype=dtype),
    )


@torch.library.custom_op("rlhfuse::linear_logprob_backward", mutates_args=())
def _backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    spread: Tensor,
    saved: Tensor,
    kept: Tensor,
    kept_ids: Tensor | None,
    kept_cu: Tensor | None,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by hidden, weight (empty unless `with_weight`) and bias (empty without one)."""
    dtype, vocab = spread.dtype, weight.shape[0]
    by_hidden = torch.zeros_like(hidden, dtype=dtype, memory_format=torch.contiguous_format)
    by_bias = spread.new_zeros(0 if bias is None else vocab)
    if _by_triton(hidden):
        from rlhfuse.kernels import triton_kept, triton_linear  # triton is optional

        by_weight = spread.new_zeros(vocab if with_weight else 0, weight.shape[1])
        if kept_ids is not None and kept_cu is not None:
            by_hidden = triton_kept.head_backward(
                triton_kept.Source(hidden, weight, bias, temperature, temperatures), labels,
                kept_ids, kept_cu, torch.stack([spread, spread, *saved.unbind()]), grad_logprob,
                grad_entropy, by_weight if with_weight else None,
                None if bias is None else by_bias,
            )  # fmt: skip
            return by_hidden.to(hidden.dtype), by_weight.to(weight.dtype), _like(by_bias, bias)
        with without_autocast(hidden):
            triton_linear.backward(
                hidden, weight, bias, labels, temperature, temperatures, spread, saved,
                grad_logprob, grad_entropy, by_hidden, by_weight if with_weight else None,
                None if bias is None else by_bias,
            )  # fmt: skip
        return by_hidden.to(hidden.dtype), by_weight.to(weight.dtype), _like(by_bias, bias)
    given = Temperatures(temperature, temperatures)
    wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    by_weight = weight_room(wide if with_weight else wide[:0], hidden.shape[0])
    room = chunk_room(wide, hidden.shape[0], vocab)
    with without_autocast(hidden):
        for rows in chunks(hidden.shape[0], vocab):
            own, block = hidden[rows].to(dtype), room[: rows.stop - rows.start]
            # Kept ones are left alone: a second pass through a retained graph needs them again.
            logits = kept[rows] if rows.stop <= len(kept) else None
            if logits is None:
                logits = head_logits(own, wide, wide_bias, block)
            by_entropy = None if grad_entropy is None else grad_entropy[rows]
            fold = RowFold(spread[rows], spread[rows], *saved[:, rows].unbind())
            above = (fold, grad_logprob[rows], by_entropy, rows, given)
            if kept_ids is None or kept_cu is None:
                by_logits = row_gradient(logits, labels[rows], *above, block)
            else:
                held = KeptRows.of(kept_ids, kept_cu, rows)
                found = kept_gradient(logits, labels[rows], held, *above)
                by_logits = block.zero_()
                by_logits[held.owners, held.ids] = found
            head_logits(by_logits, wide.T, None, by_hidden[rows])
            if with_weight:
                add_weight_gradient_(by_weight, by_logits, own, rows)
            if bias is not None:
                by_bias += by_logits.sum(0)
    return by_hidden.to(hidden.dtype), by_weight.to(weight.dtype), _like(by_bias, bias)


def _like(gradient: Tensor, of: Tensor | None) -> Tensor:
    return gradient if of is None else gradient.to(of.dtype)


@_backward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    spread: Tensor,
    saved: Tensor,
    kept: Tensor,
    kept_ids: Tensor | None,
    kept_cu: Tensor | None,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        weight.new_empty(weight.shape[0] if with_weight else 0, weight.shape[1]),
        spread.new_empty(0) if bias is None else torch.empty_like(bias),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, labels, ctx.temperature, temperatures, ctx.entropy, _, ids, cu = inputs
    _, spread, saved, kept = output
    ctx.set_materialize_grads(False)  # zeros for `kept` would be as large as it
    ctx.save_for_backward(hidden, weight, bias, labels, temperatures, spread, saved, kept, ids, cu)


def _autograd_backward(
    ctx: Any, grad_logprob: Tensor | None, grad_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Any, ...]:
    hidden, weight, bias, labels, temperatures, spread, saved, kept, ids, cu = ctx.saved_tensors
    if grad_logprob is None:
        grad_logprob = torch.zeros_like(spread)
    by_hidden, by_weight, by_bias = _backward(
        hidden, weight, bias, labels, ctx.temperature, temperatures, spread, saved, kept, ids, cu,
        grad_logprob, grad_entropy if ctx.entropy else None, ctx.needs_input_grad[1],
    )  # fmt: skip
    weight_gradient = by_weight if ctx.needs_input_grad[1] else None
    return (by_hidden, weight_gradient, None if bias is None else by_bias, *(None,) * 7)


linear_logprob_op.register_autograd(_autograd_backward, setup_context=_setup_context)
