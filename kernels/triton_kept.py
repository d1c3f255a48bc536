# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: log-probabilities renormalised over ragged lists of kept tokens.

A sampler keeps few tokens, so their logits are products with few rows of the head, which are
gathered: no [T, V], and no product with the whole head. Or they are picked out of logits that are
there anyway. The gradient by the weight sorts what was kept by its token and adds up each row of
the head by itself: no atomics, the same bits every time.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)
_BLOCK_K = 16  # kept tokens at a time
_BLOCK_H = 128
_WIDE_H = 512


@triton.jit
def _picked(
    source_ptr, stride, weight_ptr, weight_stride, bias_ptr, row, ids, live,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Logits of the kept tokens `ids` of a row of hidden states, or of logits; -inf unless live."""
    if HEAD:
        inner = tl.arange(0, BLOCK_H)
        products = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
        for k in range(0, HIDDEN, BLOCK_H):
            within = k + inner < HIDDEN
            h = tl.load(source_ptr + row * stride + k + inner, mask=within, other=0.0)
            w = tl.load(
                weight_ptr + ids.to(tl.int64)[:, None] * weight_stride + (k + inner)[None, :],
                mask=live[:, None] & within[None, :],
                other=0.0,
            )
            products += w.to(tl.float32) * h.to(tl.float32)[None, :]
        logits = tl.sum(products, 1)
        if BIAS:
            logits += tl.load(bias_ptr + ids, mask=live, other=0.0).to(tl.float32)
    else:
        logits = tl.load(source_ptr + row * stride + ids, mask=live, other=0.0).to(tl.float32)
    return tl.where(live, logits, -float("inf"))


@triton.jit(do_not_specialize=["temperature", "num_rows"])
def _fold(
    source_ptr, stride, weight_ptr, weight_stride, bias_ptr, labels_ptr, ids_ptr, cu_ptr,
    temperatures_ptr, temperature, out_ptr, num_rows,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    inverse = 1.0 / tl.load(temperatures_ptr + row) if PER_ROW else 1.0 / temperature
    slot = tl.load(cu_ptr + row).to(tl.int64)
    end = tl.load(cu_ptr + row + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    top = tl.full([], -float("inf"), tl.float32)
    chosen = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    moment = tl.zeros([BLOCK_K], tl.float32)
    while slot < end:
        live = slot + lanes < end
        ids = tl.load(ids_ptr + slot + lanes, mask=live, other=0)
        logits = _picked(
            source_ptr, stride, weight_ptr, weight_stride, bias_ptr, row, ids, live,
            HEAD, HIDDEN, BIAS, BLOCK_K, BLOCK_H,
        )  # fmt: skip
        own = tl.where(live & (ids == label), logits, -float("inf"))
        chosen = tl.maximum(chosen, tl.max(own, 0))
        new_top = tl.maximum(top, tl.max(logits, 0))
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        moved = tl.where(top == -float("inf"), 0.0, (top - anchor) * inverse)
        factor = tl.exp2(moved * _LOG2_E)
        shifted = (logits - anchor) * inverse
        weights = tl.exp2(shifted * _LOG2_E)
        moment = factor * (moment + total * moved)
        moment += tl.where(weights > 0.0, weights * shifted, 0.0)
        total = total * factor + weights
        top = new_top
        slot += BLOCK_K
    sum_total = tl.sum(total, 0)
    log_total = tl.log2(sum_total) * _LN_2
    keep = label >= 0
    logprob = (chosen - top) * inverse - log_total
    entropy = tl.maximum(log_total - tl.sum(moment, 0) / sum_total, 0.0)
    tl.store(out_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(out_ptr + num_rows + row, tl.where(keep, entropy, 0.0))
    tl.store(out_ptr + 2 * num_rows + row, top)
    tl.store(out_ptr + 3 * num_rows + row, sum_total)


@triton.jit(do_not_specialize=["temperature"])
def _slopes(
    source_ptr, stride, weight_ptr, weight_stride, bias_ptr, labels_ptr, ids_ptr, cu_ptr,
    temperatures_ptr, temperature, entropy_ptr, top_ptr, total_ptr, grad_logprob_ptr,
    grad_entropy_ptr, slopes_ptr,
    HEAD: tl.constexpr, HIDDEN: tl.constexpr, BIAS: tl.constexpr, PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Gradient by each kept logit."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    inverse = 1.0 / tl.load(temperatures_ptr + row) if PER_ROW else 1.0 / temperature
    top = tl.load(top_ptr + row)
    log_total = tl.log2(tl.load(total_ptr + row)) * _LN_2
    by_logprob = tl.load(grad_logprob_ptr + row).to(tl.float32)
    entropy = tl.load(entropy_ptr + row) if ENTROPY else 0.0
    by_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32) if ENTROPY else 0.0
    slot = tl.load(cu_ptr + row).to(tl.int64)
    end = tl.load(cu_ptr + row + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    while slot < end:
        live = slot + lanes < end
        ids = tl.load(ids_ptr + slot + lanes, mask=live, other=0)
        logits = _picked(
            source_ptr, stride, weight_ptr, weight_stride, bias_ptr, row, ids, live,
            HEAD, HIDDEN, BIAS, BLOCK_K, BLOCK_H,
        )  # fmt: skip
        log_p = (logits - top) * inverse - log_total
        p = tl.exp2(log_p * _LOG2_E)
        slope = by_logprob + tl.where(p > 0.0, by_entropy * (log_p + entropy), 0.0)
        gradient = (tl.where(ids == label, by_logprob, 0.0) - p * slope) * inverse
        # The label decides, not a product with 0: an ignored row may hold NaN.
        tl.store(slopes_ptr + slot + lanes, tl.where(label >= 0, gradient, 0.0), mask=live)
        slot += BLOCK_K


@triton.jit
def _by_hidden(
    weight_ptr, weight_stride, ids_ptr, cu_ptr, slopes_ptr, out_ptr,
    HIDDEN: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inner = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    within = inner < HIDDEN
    slot = tl.load(cu_ptr + row).to(tl.int64)
    end = tl.load(cu_ptr + row + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    gathered = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    while slot < end:
        live = slot + lanes < end
        ids = tl.load(ids_ptr + slot + lanes, mask=live, other=0)
        slopes = tl.load(slopes_ptr + slot + lanes, mask=live, other=0.0)
        w = tl.load(
            weight_ptr + ids.to(tl.int64)[:, None] * weight_stride + inner[None, :],
            mask=live[:, None] & within[None, :],
            other=0.0,
        )
        gathered += slopes[:, None] * w.to(tl.float32)
        slot += BLOCK_K
    tl.store(out_ptr + row * HIDDEN + inner, tl.sum(gathered, 0), mask=within)


@triton.jit
def _by_weight(
    hidden_ptr, hidden_stride, order_ptr, owners_ptr, bounds_ptr, slopes_ptr, out_ptr, by_bias_ptr,
    HIDDEN: tl.constexpr, BIAS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    inner = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    within = inner < HIDDEN
    place = tl.load(bounds_ptr + token).to(tl.int64)
    end = tl.load(bounds_ptr + token + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    gathered = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    summed = tl.zeros([BLOCK_K], tl.float32)
    while place < end:
        live = place + lanes < end
        slots = tl.load(order_ptr + place + lanes, mask=live, other=0)
        rows = tl.load(owners_ptr + slots, mask=live, other=0)
        slopes = tl.load(slopes_ptr + slots, mask=live, other=0.0)
        h = tl.load(
            hidden_ptr + rows[:, None] * hidden_stride + inner[None, :],
            mask=live[:, None] & within[None, :],
            other=0.0,
        )
        gathered += slopes[:, None] * h.to(tl.float32)
        summed += slopes
        place += BLOCK_K
    tl.store(out_ptr + token * HIDDEN + inner, tl.sum(gathered, 0), mask=within)
    if BIAS and tl.program_id(1) == 0:
        tl.store(by_bias_ptr + token, tl.sum(summed, 0))


@triton.jit(do_not_specialize=["first"])
def _add(
    slopes_ptr, ids_ptr, cu_ptr, slab_ptr, slab_stride, first,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(cu_ptr + row).to(tl.int64)
    end = tl.load(cu_ptr + row + 1).to(tl.int64)
    lanes = tl.arange(0, BLOCK_K)
    while slot < end:
        live = slot + lanes < end
        column = tl.load(ids_ptr + slot + lanes, mask=live, other=-1).to(tl.int64) - first
        here = live & (column >= 0) & (column < WIDTH)
        slopes = tl.load(slopes_ptr + slot + lanes, mask=here, other=0.0)
        at = slab_ptr + row * slab_stride + column
        tl.store(at, tl.load(at, mask=here, other=0.0).to(tl.float32) + slopes, mask=here)
        slot += BLOCK_K


@dataclass(frozen=True, slots=True)
class Source:
    """Where logits come from: rows [T, H] times a head [V, H] (and its bias [V]), or, without a
    head, they are the rows [T, V]; over a temperature, or one per row."""

    rows: Tensor
    weight: Tensor | None
    bias: Tensor | None
    temperature: float
    temperatures: Tensor | None


def fold(source: Source, labels: Tensor, ids: Tensor, cu: Tensor) -> Tensor:
    """[4, T] float32: logprob, entropy, largest logit, sum of the shifted exponentials.

    Row t kept ``ids[cu[t] : cu[t + 1]]``; a label that is not among them has logprob -inf.
    """
    out = torch.empty(4, labels.numel(), dtype=torch.float32, device=labels.device)
    if labels.numel():
        _fold[(labels.numel(),)](
            *_source(source, labels, ids, cu),
            out,
            labels.numel(),
            **_sizes(source),
        )
    return out


def slopes(
    source: Source,
    labels: Tensor,
    ids: Tensor,
    cu: Tensor,
    folded: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    into: Tensor,
) -> None:
    """Write the gradient by each kept logit of these rows into float32 [K]; folded: from `fold`,
    of which its first row is not read."""
    if labels.numel():
        _, entropy, top, total = folded.unbind()
        _slopes[(labels.numel(),)](
            *_source(source, labels, ids, cu),
            entropy.contiguous(),
            top.contiguous(),
            total.contiguous(),
            grad_logprob.contiguous(),
            into if grad_entropy is None else grad_entropy.contiguous(),
            into,
            **_sizes(source),
            ENTROPY=grad_entropy is not None,
        )


def head_backward(
    source: Source,
    labels: Tensor,
    ids: Tensor,
    cu: Tensor,
    folded: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    by_weight: Tensor | None,
    by_bias: Tensor | None,
) -> Tensor:
    """Gradient by the hidden states, float32 [T, H]; see `slopes` and `_backward`."""
    by_kept = folded.new_empty(ids.numel())
    slopes(source, labels, ids, cu, folded, grad_logprob, grad_entropy, by_kept)
    return _backward(source, ids, cu, by_kept, by_weight, by_bias)


def _backward(
    source: Source,
    ids: Tensor,
    cu: Tensor,
    by_logits: Tensor,
    by_weight: Tensor | None,
    by_bias: Tensor | None,
) -> Tensor:
    """Gradient by the hidden states, float32 [T, H], from that by the kept logits [K]; those by
    weight and bias are written into float32 `by_*`."""
    assert source.weight is not None, "logits have no head"
    hidden, weight = source.rows.contiguous(), source.weight.contiguous()
    (num_tokens, size), vocab = hidden.shape, weight.shape[0]
    wide = min(_WIDE_H, triton.next_power_of_2(size))
    by_hidden = torch.empty(num_tokens, size, dtype=torch.float32, device=hidden.device)
    ids, cu = ids.contiguous(), cu.contiguous()
    if num_tokens:
        _by_hidden[(num_tokens, triton.cdiv(size, wide))](
            weight, weight.stride(0), ids, cu, by_logits, by_hidden,
            HIDDEN=size, BLOCK_K=_BLOCK_K, BLOCK_H=wide, num_warps=4,
        )  # fmt: skip
    if by_weight is None and by_bias is None:
        return by_hidden
    if by_weight is None:  # only the bias is trained: one column is formed for nothing
        by_weight, hidden, wide = by_hidden.new_empty(vocab, 1), hidden[:, :1].contiguous(), 1
    numbers = torch.arange(num_tokens, device=ids.device)
    owners = torch.repeat_interleave(numbers, cu.diff().long(), output_size=ids.numel())
    in_order, order = torch.sort(ids.long(), stable=True)
    bounds = torch.searchsorted(in_order, torch.arange(vocab + 1, device=ids.device))
    _by_weight[(vocab, triton.cdiv(hidden.shape[1], wide))](
        hidden, hidden.stride(0), order, owners, bounds, by_logits, by_weight,
        by_weight if by_bias is None else by_bias,
        HIDDEN=hidden.shape[1], BIAS=by_bias is not None, BLOCK_K=_BLOCK_K, BLOCK_H=wide,
        num_warps=4,
    )  # fmt: skip
    return by_hidden


def add(by_kept: Tensor, ids: Tensor, cu: Tensor, slab: Tensor, first: int) -> None:
    """Add the gradient by kept logits [K] to columns of that by all of them, which begin at token
    `first`: slab [R, W], in its type."""
    if slab.numel():
        _add[(slab.shape[0],)](
            by_kept, ids.contiguous(), cu.contiguous(), slab, slab.stride(0), first,
            WIDTH=slab.shape[1], BLOCK_K=128, num_warps=4,
        )  # fmt: skip


def _source(source: Source, labels: Tensor, ids: Tensor, cu: Tensor) -> tuple[object, ...]:
    """A kernel's first arguments; what it does not read stands for what is not there."""
    rows = source.rows.contiguous()
    weight = rows if source.weight is None else source.weight.contiguous()
    return (
        rows,
        rows.stride(0),
        weight,
        weight.stride(0),
        weight if source.bias is None else source.bias.contiguous(),
        labels.contiguous(),
        ids.contiguous(),
        cu.contiguous(),
        rows if source.temperatures is None else source.temperatures.float().contiguous(),
        source.temperature,
    )


def _sizes(source: Source) -> dict[str, int | bool]:
    head = source.weight is not None
    return {
        "HEAD": head,
        "HIDDEN": source.rows.shape[1] if head else 1,
        "BIAS": source.bias is not None,
        "PER_ROW": source.temperatures is not None,
        "BLOCK_K": _BLOCK_K if head else 128,
        "BLOCK_H": _BLOCK_H,
        "num_warps": 4,
    }
