"""Log-probability (and entropy) of chosen tokens from hidden states and the LM head.

Works through the tokens in chunks, so that [T, V] never exists, and keeps logits in float32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from rlhfuse.kernels import reference
from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.logprob import check_rows, split_temperature
from rlhfuse.kernels.reference import IGNORE_INDEX, KeptTokens, TokenLogprob, accumulation_dtype
from rlhfuse.kernels.rows import (
    Temperatures,
    fold_rows_,
    log_softmax_labels,
    log_softmax_rows,
    row_gradient,
)

# Matrix products with fewer rows take other code paths on a CPU and differ in the last bits, so
# a token's result would depend on how many others are computed with it.
MIN_ROWS = 16
_MAX_ROWS = 512
_CHUNK_BYTES = 32 << 20


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
            and sampler speak of one distribution.
        tp_group: every rank of it calls this with the same hidden states and labels, and with its
            own rows of weight and bias (parts of the vocabulary, in rank order; labels count
            through all of them). Results and the gradient by hidden are whole on every rank.

    Raises:
        ValueError: shapes that do not fit together, or `kept` with a cut vocabulary.
    """
    check_rows(hidden, labels, temperature)
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[1]}] for hidden {tuple(hidden.shape)}, "
            f"not {tuple(weight.shape)}"
        )
    if tp_group is not None and tp_group.size() > 1:
        return _vocab_parallel(
            hidden, weight, labels, bias, temperature, entropy, ignore_index, kept, tp_group
        )
    if choose(hidden.device) is Path.REFERENCE:
        return reference.linear_logprob(
            hidden, weight, labels, bias=bias, temperature=temperature, entropy=entropy,
            ignore_index=ignore_index, kept=kept,
        )  # fmt: skip
    if kept is not None and kept.cu.shape != (labels.numel() + 1,):
        raise ValueError(
            f"kept.cu must be one longer than the {labels.numel()} labels, "
            f"not {tuple(kept.cu.shape)}"
        )
    marked = torch.where(labels == ignore_index, -1, labels.long())
    logprob, spread = _LinearLogprob.apply(  # type: ignore[no-untyped-call]
        hidden,
        weight,
        bias,
        marked,
        *split_temperature(temperature),
        entropy,
        keep_logits_bytes,
        None if kept is None else kept.ids,
        None if kept is None else kept.cu,
    )
    return TokenLogprob(logprob, spread if entropy else None)


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
    from rlhfuse.kernels.vocab_parallel import VocabParallelLogprob  # built on this module

    if kept is not None:
        raise ValueError(
            "kept tokens with a tp_group are not supported: gather the head first, or leave "
            "one of the two out"
        )
    marked = torch.where(labels == ignore_index, -1, labels.long())
    logprob, spread = VocabParallelLogprob.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, marked, *split_temperature(temperature), group
    )
    return TokenLogprob(logprob, spread if entropy else None)


def chunk_rows(vocab: int) -> int:
    """Rows of a chunk: a function of the vocabulary alone."""
    rows = _CHUNK_BYTES // (4 * max(vocab, 1))
    return min(_MAX_ROWS, max(MIN_ROWS, rows - rows % MIN_ROWS))


def chunks(num_rows: int, vocab: int) -> list[slice]:
    """The ranges of rows that are computed together."""
    step = chunk_rows(vocab)
    return [slice(i, min(i + step, num_rows)) for i in range(0, num_rows, step)]


def head_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``hidden @ weight.T + bias`` for one chunk, with at least `MIN_ROWS` rows inside."""
    num_rows = hidden.shape[0]
    hidden = hidden.contiguous()  # the strides choose the code path, too
    if num_rows < MIN_ROWS:
        padded = hidden.new_zeros(MIN_ROWS, hidden.shape[1])
        padded[:num_rows] = hidden
        hidden = padded
    logits = hidden @ weight.T
    if bias is not None:
        logits += bias
    return logits[:num_rows]


def _drop_(logits: Tensor, ids: Tensor | None, cu: Tensor | None, rows: slice) -> Tensor:
    """Set the logits of these rows that the sampler did not keep to -inf, in place."""
    if ids is None or cu is None:
        return logits
    bounds = cu[rows.start : rows.stop + 1].long()
    owners = torch.repeat_interleave(
        torch.arange(logits.shape[0], device=logits.device), bounds.diff()
    )
    dropped = torch.ones_like(logits, dtype=torch.bool)
    dropped[owners, ids[bounds[0] : bounds[-1]].long()] = False
    return logits.masked_fill_(dropped, -torch.inf)


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperature: float,
        temperatures: Tensor | None,
        entropy: bool,
        keep_logits_bytes: int,
        kept_ids: Tensor | None,
        kept_cu: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.temperature, ctx.entropy = temperature, entropy
        dtype = accumulation_dtype(hidden)
        triton = choose(hidden.device) is Path.TRITON and kept_ids is None
        if triton and dtype == torch.float32:
            from rlhfuse.kernels import triton_linear  # triton is optional

            out = triton_linear.fold(hidden, weight, bias, labels, temperature, temperatures)
            ctx.save_for_backward(
                hidden, weight, bias, labels, temperatures, out, kept_ids, kept_cu
            )
            return out[0].clone(), out[1].clone()
        wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        out = torch.empty(2, hidden.shape[0], dtype=dtype, device=hidden.device)
        given = Temperatures(temperature, temperatures)
        kept: list[Tensor] = []
        room = keep_logits_bytes if any(ctx.needs_input_grad[:3]) else 0
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            logits = head_logits(hidden[rows].to(dtype), wide, wide_bias)
            logits = _drop_(logits, kept_ids, kept_cu, rows)
            chosen = log_softmax_labels(logits, labels[rows], rows, given, logits)
            fold = fold_rows_(logits, chosen, labels[rows], entropy=entropy)
            out[0, rows], out[1, rows] = fold.logprob, fold.entropy
            room -= logits.numel() * logits.element_size()
            if room >= 0:
                kept.append(logits)
        ctx.save_for_backward(
            hidden, weight, bias, labels, temperatures, out, kept_ids, kept_cu, *kept
        )
        return out[0].clone(), out[1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> tuple[Any, ...]:
        hidden, weight, bias, labels, temperatures, out, ids, cu, *kept = ctx.saved_tensors
        dtype, given = out.dtype, Temperatures(ctx.temperature, temperatures)
        wide, wide_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        by_hidden = torch.empty_like(hidden, dtype=dtype)
        by_weight = torch.zeros_like(wide) if ctx.needs_input_grad[1] else None
        by_bias = None if bias is None else torch.zeros_like(wide[:, 0])
        for index, rows in enumerate(chunks(hidden.shape[0], weight.shape[0])):
            if index < len(kept):
                # Out of place: a second backward pass through a retained graph needs it again.
                block, by_logits = kept[index], torch.empty_like(kept[index])
            else:
                logits = head_logits(hidden[rows].to(dtype), wide, wide_bias)
                block = by_logits = _drop_(logits, ids, cu, rows)
                log_softmax_rows(block, rows, given, block)
            row_gradient(
                block,
                labels[rows],
                out[1, rows],
                grad_logprob[rows],
                grad_entropy[rows] if ctx.entropy else None,
                rows,
                given,
                out=by_logits,
            )
            by_hidden[rows] = head_logits(by_logits, wide.T, None)
            if by_weight is not None:
                by_weight.addmm_(by_logits.T, hidden[rows].to(dtype))
            if by_bias is not None:
                by_bias += by_logits.sum(0)
        return (
            by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
            None if by_bias is None or bias is None else by_bias.to(bias.dtype),
            *(None,) * 7,
        )
