# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: linear_logprob. Logits live in registers, in float32, and only there.

Forward, the vocabulary is split over programs; each leaves its maximum, sum of exponentials,
first moment and (where the label is its own) the label's logit per token, 16 bytes, merged
afterwards. Backward, logits are formed again a tile at a time and leave as their gradient, in the
type of the hidden states, a slab of the vocabulary at a time; the two products that follow add up
in float32. No atomics: the same bits every time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhfuse.kernels.precision import add_product_
from rlhfuse.kernels.rows import FLOOR, Temperatures

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_MAX_SPLITS = 32
_GROUP = 8  # blocks of tokens that run side by side and share what they read of the weight
_CHUNK_TOKENS = 8192
_SLAB = 16_384


@triton.jit
def _place(num_tokens, columns: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """(block of tokens, part of the vocabulary): groups of token blocks, parts inside them."""
    program = tl.program_id(0)
    blocks = (num_tokens + BLOCK_T - 1) // BLOCK_T
    first = (program // (GROUP * columns)) * GROUP
    height = tl.minimum(blocks - first, GROUP)
    inside = program % (GROUP * columns)
    return first + inside % height, inside // height


@triton.jit
def _tile(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, bias_ptr, rows, live, columns, inside,
    HIDDEN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Logits of a tile, -inf in columns that are not inside."""
    inner = tl.arange(0, BLOCK_H)
    logits = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for k in range(0, HIDDEN, BLOCK_H):
        h = tl.load(
            hidden_ptr + rows[:, None] * hidden_stride + (k + inner)[None, :],
            mask=live[:, None] & (k + inner < HIDDEN)[None, :],
            other=0.0,
        )
        w = tl.load(
            weight_ptr + columns.to(tl.int64)[None, :] * weight_stride + (k + inner)[:, None],
            mask=inside[None, :] & (k + inner < HIDDEN)[:, None],
            other=0.0,
        )
        logits = tl.dot(h, w, logits, input_precision="ieee")
    if BIAS:
        bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    # Columns beyond the vocabulary must not count: a logit of 0 would.
    return tl.where(inside[None, :], logits, -float("inf"))


@triton.jit(do_not_specialize=["num_tokens", "temperature"])
def _partials(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, bias_ptr, labels_ptr, temperatures_ptr,
    temperature, out_ptr, num_tokens,
    VOCAB: tl.constexpr, HIDDEN: tl.constexpr, SPLIT: tl.constexpr, SPLITS: tl.constexpr,
    BIAS: tl.constexpr, PER_ROW: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    block, split = _place(num_tokens, SPLITS, BLOCK_T, GROUP)
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < num_tokens
    labels = tl.load(labels_ptr + rows, mask=live, other=-1)
    inverse = tl.zeros([BLOCK_T], tl.float32) + 1.0 / temperature
    if PER_ROW:
        inverse = 1.0 / tl.load(temperatures_ptr + rows, mask=live, other=1.0)
    top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    moment = tl.zeros([BLOCK_T], tl.float32)
    chosen = tl.zeros([BLOCK_T], tl.float32)
    for tile in range(0, SPLIT, BLOCK_V):
        columns = split * SPLIT + tile + tl.arange(0, BLOCK_V)
        logits = _tile(
            hidden_ptr, hidden_stride, weight_ptr, weight_stride, bias_ptr, rows, live, columns,
            columns < VOCAB, HIDDEN, BIAS, BLOCK_T, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        chosen += tl.sum(tl.where(columns[None, :] == labels[:, None], logits, 0.0), 1)
        new_top = tl.maximum(top, tl.max(logits, 1))
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        moved = tl.where(top == -float("inf"), 0.0, (top - anchor) * inverse)
        factor = tl.exp2(moved * _LOG2_E)
        shifted = (logits - anchor[:, None]) * inverse[:, None]
        weights = tl.exp2(shifted * _LOG2_E)
        moment = factor * (moment + total * moved)
        moment += tl.sum(tl.where(weights > 0.0, weights * shifted, 0.0), 1)
        total = total * factor + tl.sum(weights, 1)
        top = new_top
    at = out_ptr + (split.to(tl.int64) * 4) * num_tokens + rows
    tl.store(at, top, mask=live)
    tl.store(at + num_tokens, total, mask=live)
    tl.store(at + 2 * num_tokens, moment, mask=live)
    tl.store(at + 3 * num_tokens, chosen, mask=live)


@triton.jit(do_not_specialize=["num_tokens", "temperature", "first"])
def _logit_gradient(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, bias_ptr, labels_ptr, temperatures_ptr,
    temperature, entropy_ptr, top_ptr, total_ptr, grad_logprob_ptr, grad_entropy_ptr,
    out_ptr, num_tokens, first,
    WIDTH: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    block, part = _place(num_tokens, (WIDTH + BLOCK_V - 1) // BLOCK_V, BLOCK_T, GROUP)
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = rows < num_tokens
    columns = part * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = columns < WIDTH
    logits = _tile(
        hidden_ptr, hidden_stride, weight_ptr, weight_stride, bias_ptr, rows, live, columns,
        inside, HIDDEN, BIAS, BLOCK_T, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    labels = tl.load(labels_ptr + rows, mask=live, other=-1)
    inverse = tl.zeros([BLOCK_T], tl.float32) + 1.0 / temperature
    if PER_ROW:
        inverse = 1.0 / tl.load(temperatures_ptr + rows, mask=live, other=1.0)
    top = tl.load(top_ptr + rows, mask=live, other=0.0)
    log_total = tl.log2(tl.load(total_ptr + rows, mask=live, other=1.0)) * _LN_2
    by_logprob = tl.load(grad_logprob_ptr + rows, mask=live, other=0.0).to(tl.float32)
    log_p = (logits - top[:, None]) * inverse[:, None] - log_total[:, None]
    p = tl.exp2(log_p * _LOG2_E)
    slope = by_logprob[:, None]
    if ENTROPY:
        by_entropy = tl.load(grad_entropy_ptr + rows, mask=live, other=0.0).to(tl.float32)
        entropy = tl.load(entropy_ptr + rows, mask=live, other=0.0)
        bend = by_entropy[:, None] * (log_p + entropy[:, None])
        slope += tl.where(p > 0.0, bend, 0.0)
    own = (first + columns)[None, :] == labels[:, None]
    gradient = (tl.where(own, by_logprob[:, None], 0.0) - p * slope) * inverse[:, None]
    # The label decides, not a product with 0: an ignored row may hold NaN.
    gradient = tl.where((labels >= 0)[:, None], gradient, 0.0)
    tl.store(
        out_ptr + rows[:, None] * WIDTH + columns[None, :],
        gradient,
        mask=live[:, None] & inside[None, :],
    )


def tiles(dtype: torch.dtype) -> tuple[int, int, int, int]:
    """(tokens, vocabulary, hidden, warps) of a tile."""
    return (32, 64, 32, 4) if dtype == torch.float32 else (128, 128, 64, 8)


def fold(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
) -> Tensor:
    """[4, T] float32: logprob, entropy, largest logit, sum of the shifted exponentials."""
    num_tokens, hidden_size = hidden.shape
    vocab = weight.shape[0]
    hidden, weight = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    block_t, block_v, block_h, warps = tiles(hidden.dtype)
    # A function of the vocabulary alone: a token's result does not depend on the others.
    splits = min(_MAX_SPLITS, -(-vocab // block_v))
    split = -(-vocab // (splits * block_v)) * block_v
    splits = -(-vocab // split)
    partials = torch.empty(splits, 4, num_tokens, dtype=torch.float32, device=hidden.device)
    if num_tokens:
        _partials[(-(-num_tokens // block_t) * splits,)](
            hidden,
            hidden.stride(0),
            weight,
            weight.stride(0),
            partials if bias is None else bias.contiguous(),
            labels.contiguous(),
            partials if temperatures is None else temperatures.float().contiguous(),
            temperature,
            partials,
            num_tokens,
            VOCAB=vocab,
            HIDDEN=hidden_size,
            SPLIT=split,
            SPLITS=splits,
            BIAS=bias is not None,
            PER_ROW=temperatures is not None,
            GROUP=_GROUP,
            BLOCK_T=block_t,
            BLOCK_V=block_v,
            BLOCK_H=block_h,
            num_warps=warps,
        )
    return _merge(partials, labels, Temperatures(temperature, temperatures))


def backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    spread: Tensor,
    saved: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    by_hidden: Tensor,
    by_weight: Tensor | None,
    by_bias: Tensor | None,
) -> None:
    """Add the gradients to float32 `by_*`, which begin as zeros.

    saved: [2, T], largest logit and sum, from `fold`. Beside the gradients it needs a slab of at
    most 8,192 tokens by 16,384 columns in the type of `hidden`.
    """
    hidden, weight = hidden.contiguous(), weight.to(hidden.dtype).contiguous()
    per_token = None if temperatures is None else temperatures.float().contiguous()
    labels, spread, saved = labels.contiguous(), spread.contiguous(), saved.contiguous()
    grad_logprob = grad_logprob.contiguous()
    grad_entropy = None if grad_entropy is None else grad_entropy.contiguous()
    vocab, num_tokens = weight.shape[0], hidden.shape[0]
    room = hidden.new_empty(min(num_tokens, _CHUNK_TOKENS) * min(vocab, _SLAB))
    block_t, block_v, block_h, warps = tiles(hidden.dtype)
    for start in range(0, num_tokens, _CHUNK_TOKENS):
        rows = slice(start, min(start + _CHUNK_TOKENS, num_tokens))
        own, count = hidden[rows], rows.stop - start
        for first in range(0, vocab, _SLAB):
            part = slice(first, min(first + _SLAB, vocab))
            width = part.stop - first
            slab = room[: count * width].view(count, width)
            _logit_gradient[(-(-count // block_t) * -(-width // block_v),)](
                own,
                own.stride(0),
                weight[part],
                weight.stride(0),
                slab if bias is None else bias[part].contiguous(),
                labels[rows],
                slab if per_token is None else per_token[rows],
                temperature,
                spread[rows],
                saved[0, rows],
                saved[1, rows],
                grad_logprob[rows],
                slab if grad_entropy is None else grad_entropy[rows],
                slab,
                count,
                first,
                WIDTH=width,
                HIDDEN=hidden.shape[1],
                BIAS=bias is not None,
                PER_ROW=per_token is not None,
                ENTROPY=grad_entropy is not None,
                GROUP=_GROUP,
                BLOCK_T=block_t,
                BLOCK_V=block_v,
                BLOCK_H=block_h,
                num_warps=warps,
            )
            add_product_(by_hidden[rows], slab, weight[part])
            if by_weight is not None:
                add_product_(by_weight[part], slab.t(), own)
            if by_bias is not None:
                by_bias[part] += slab.sum(0, dtype=torch.float32)


def _merge(partials: Tensor, labels: Tensor, temperatures: Temperatures) -> Tensor:
    """Splits [S, 4, T] to the result; each rescaled to the largest maximum."""
    tops, totals, moments, chosen = partials.unbind(1)
    everything = slice(None)
    top = tops.amax(0)
    # An all -inf split weighs nothing.
    moved = torch.stack([temperatures.divide_(own - top, everything) for own in tops])
    moved.clamp_(min=FLOOR)
    factor = moved.exp()
    total = (totals * factor).sum(0)
    log_total = total.log()
    logprob = temperatures.divide_(chosen.sum(0) - top, everything) - log_total
    spread = log_total - (factor * (moments + totals * moved)).sum(0) / total
    keep = labels >= 0
    return torch.stack(
        [torch.where(keep, logprob, 0.0), torch.where(keep, spread, 0.0), top, total]
    )
