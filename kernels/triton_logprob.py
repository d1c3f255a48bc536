# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (a jit function is a program in another language: its arguments have no Python types)
"""Triton: log-probability and entropy from logits, one program per row, one pass forward.

The running maximum stays in the units of the logits and is subtracted before scaling, so a shift
of all logits costs no accuracy. Temperature and number of rows are data: no value of them
compiles anything again. The vocabulary is a model's constant and is compiled in.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(do_not_specialize=["temperature", "num_rows"])
def _forward(
    logits_ptr,
    row_stride,
    labels_ptr,
    temperatures_ptr,
    temperature,
    logprob_ptr,
    entropy_ptr,
    saved_ptr,
    num_rows,
    VOCAB: tl.constexpr,
    PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    inverse = 1.0 / tl.load(temperatures_ptr + row) if PER_ROW else 1.0 / temperature
    logits_ptr += row * row_stride
    lanes = tl.arange(0, BLOCK)
    top = -float("inf")
    total = tl.zeros([BLOCK], tl.float32)
    moment = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        columns = start + lanes
        x = tl.load(logits_ptr + columns, mask=columns < VOCAB, other=-float("inf"))
        x = x.to(tl.float32)
        new_top = tl.maximum(top, tl.max(x, 0))
        # While everything was -inf there is nothing to rescale, and -inf - -inf is NaN.
        anchor = tl.where(new_top == -float("inf"), 0.0, new_top)
        moved = tl.where(top == -float("inf"), 0.0, (top - anchor) * inverse)
        factor = tl.exp2(moved * _LOG2_E)
        scaled = (x - anchor) * inverse
        weight = tl.exp2(scaled * _LOG2_E)
        if ENTROPY:
            moment = factor * (moment + total * moved)
            moment += tl.where(weight > 0.0, weight * scaled, 0.0)
        total = total * factor + weight
        top = new_top
    total_sum = tl.sum(total, 0)
    log_total = tl.log2(total_sum) * _LN_2
    keep = label >= 0
    chosen = tl.load(logits_ptr + label, mask=keep, other=0.0).to(tl.float32)
    logprob = (chosen - top) * inverse - log_total
    spread = log_total - tl.sum(moment, 0) / total_sum if ENTROPY else 0.0
    tl.store(logprob_ptr + row, tl.where(keep, logprob, 0.0))
    tl.store(entropy_ptr + row, tl.where(keep, spread, 0.0))
    tl.store(saved_ptr + row, top)
    tl.store(saved_ptr + num_rows + row, total_sum)


@triton.jit(do_not_specialize=["temperature", "num_rows"])
def _backward(
    logits_ptr,
    row_stride,
    gradient_ptr,
    gradient_stride,
    labels_ptr,
    temperatures_ptr,
    temperature,
    entropy_ptr,
    saved_ptr,
    grad_logprob_ptr,
    grad_entropy_ptr,
    num_rows,
    VOCAB: tl.constexpr,
    PER_ROW: tl.constexpr,
    ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    inverse = 1.0 / tl.load(temperatures_ptr + row) if PER_ROW else 1.0 / temperature
    entropy = tl.load(entropy_ptr + row)
    top = tl.load(saved_ptr + row)
    log_total = tl.log2(tl.load(saved_ptr + num_rows + row)) * _LN_2
    by_logprob = tl.load(grad_logprob_ptr + row).to(tl.float32)
    by_entropy = tl.load(grad_entropy_ptr + row).to(tl.float32) if ENTROPY else 0.0
    logits_ptr += row * row_stride
    gradient_ptr += row * gradient_stride
    lanes = tl.arange(0, BLOCK)
    for start in range(0, VOCAB, BLOCK):
        columns = start + lanes
        inside = columns < VOCAB
        x = tl.load(logits_ptr + columns, mask=inside, other=-float("inf")).to(tl.float32)
        log_p = (x - top) * inverse - log_total
        p = tl.exp2(log_p * _LOG2_E)
        slope = by_logprob + tl.where(p > 0.0, by_entropy * (log_p + entropy), 0.0)
        gradient = tl.where(columns == label, by_logprob, 0.0) - p * slope
        # The label decides, not a product with 0: an ignored row may hold NaN.
        gradient = tl.where(label >= 0, gradient * inverse, 0.0)
        tl.store(gradient_ptr + columns, gradient, mask=inside)


def block_size(vocab: int) -> int:
    """Columns that one program reads at a time."""
    return min(4096, max(16, 1 << (vocab - 1).bit_length()))


def forward(
    logits: Tensor,
    labels: Tensor,
    temperature: float,
    temperatures: Tensor | None,
    entropy: bool,
    logprob: Tensor,
    spread: Tensor,
    saved: Tensor,
) -> None:
    """Write logprob [T], entropy [T], and the maximum and the shifted sum [2, T]."""
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    _forward[(num_rows,)](
        rows,
        rows.stride(0),
        labels.contiguous(),
        saved if temperatures is None else temperatures.float().contiguous(),
        temperature,
        logprob,
        spread,
        saved,
        num_rows,
        VOCAB=vocab,
        PER_ROW=temperatures is not None,
        ENTROPY=entropy,
        BLOCK=block_size(vocab),
        num_warps=8,
    )


def backward(
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
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    rows = logits if logits.stride(1) == 1 else logits.contiguous()
    into = gradient if gradient.stride(1) == 1 else torch.empty_like(rows)
    _backward[(num_rows,)](
        rows,
        rows.stride(0),
        into,
        into.stride(0),
        labels.contiguous(),
        saved if temperatures is None else temperatures.float().contiguous(),
        temperature,
        spread,
        saved,
        grad_logprob.contiguous(),
        saved if grad_entropy is None else grad_entropy.contiguous(),
        num_rows,
        VOCAB=vocab,
        PER_ROW=temperatures is not None,
        ENTROPY=grad_entropy is not None,
        BLOCK=block_size(vocab),
        num_warps=8,
    )
    if into is not gradient:
        gradient.copy_(into)
