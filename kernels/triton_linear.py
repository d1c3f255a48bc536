# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: the forward pass of linear_logprob. Logits live in registers, in float32, and only there.

The vocabulary is split over programs; each leaves its maximum, sum of exponentials, first moment
and (where the label is its own) the label's logit per token, 16 bytes, merged afterwards.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rlhfuse.kernels.rows import FLOOR, Temperatures

_LOG2_E = tl.constexpr(1.4426950408889634)
_MAX_SPLITS = 32


@triton.jit(do_not_specialize=["num_tokens", "temperature"])
def _partials(
    hidden_ptr,
    hidden_stride,
    weight_ptr,
    weight_stride,
    bias_ptr,
    labels_ptr,
    temperatures_ptr,
    temperature,
    out_ptr,
    num_tokens,
    VOCAB: tl.constexpr,
    HIDDEN: tl.constexpr,
    SPLIT: tl.constexpr,
    BIAS: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    live = rows < num_tokens
    labels = tl.load(labels_ptr + rows, mask=live, other=-1)
    inverse = tl.zeros([BLOCK_T], tl.float32) + 1.0 / temperature
    if PER_ROW:
        inverse = 1.0 / tl.load(temperatures_ptr + rows, mask=live, other=1.0)
    top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    moment = tl.zeros([BLOCK_T], tl.float32)
    chosen = tl.zeros([BLOCK_T], tl.float32)
    inner = tl.arange(0, BLOCK_H)
    for tile in range(0, SPLIT, BLOCK_V):
        columns = split * SPLIT + tile + tl.arange(0, BLOCK_V)
        inside = columns < VOCAB
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
        logits = tl.where(inside[None, :], logits, -float("inf"))
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
    small = hidden.dtype == torch.float32
    block_t, block_v, block_h = (32, 64, 32) if small else (128, 128, 64)
    # Few tokens: more splits, to fill the device; each multiple of the tile.
    splits = min(_MAX_SPLITS, -(-vocab // block_v))
    split = -(-vocab // (splits * block_v)) * block_v
    splits = -(-vocab // split)
    partials = torch.empty(splits, 4, num_tokens, dtype=torch.float32, device=hidden.device)
    if num_tokens:
        _partials[(-(-num_tokens // block_t), splits)](
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
            BIAS=bias is not None,
            PER_ROW=temperatures is not None,
            BLOCK_T=block_t,
            BLOCK_V=block_v,
            BLOCK_H=block_h,
            num_warps=4 if small else 8,
        )
    return _merge(partials, labels, Temperatures(temperature, temperatures))


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
