"""Rows of float32 logits on any device: the plain-torch core of the log-probability functions.

Every step is per row, so a row's result does not depend on the other rows. Passes over the
vocabulary are what costs, so there are as few as torch allows, and none allocates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a log-probability adds exactly 0 to every sum (float32 and float64 alike), and -inf
# becomes a number: 0 * -inf would be NaN.
FLOOR = -1.0e4

# torch's own log_softmax adds a row up in order, in float32. Up to here its log-probabilities stay
# within 1e-6 of float64 (relative norm); at 151,936 it was 1.2e-6, at 262,144 1.9e-6.
_FUSED_VOCAB = 32_768


@dataclass(frozen=True, slots=True)
class Temperatures:
    """A number, or one per token of the whole batch (then the number is not used)."""

    number: float
    per_token: Tensor | None

    @property
    def one(self) -> bool:
        """Whether every temperature is 1, so that there is nothing to divide by."""
        return self.per_token is None and self.number == 1.0

    def divide_(self, block: Tensor, rows: slice) -> Tensor:
        """Divide the block of these rows, [R] or [R, V], in place."""
        if self.per_token is not None:
            own = self.per_token[rows].to(block.dtype)
            return block.div_(own if block.dim() == 1 else own[:, None])
        return block if self.number == 1.0 else block.div_(self.number)


@dataclass(frozen=True, slots=True)
class RowFold:
    """Log-probability of each row's label and entropy of each row, [R] each."""

    logprob: Tensor
    entropy: Tensor


def log_softmax_rows(logits: Tensor, rows: slice, temperatures: Temperatures, out: Tensor) -> None:
    """log softmax(logits / temperature) of these rows, [R, V], written to contiguous `out`.

    Both ways work row by row, so no row depends on the others. The maximum goes before the
    division: a shift of all logits then costs no accuracy.

    Args:
        logits: [R, V] of any layout and float type; may be `out`. rows: where they lie in the
            batch.
    """
    if logits.shape[1] == 0:
        return
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)
    fused = logits.shape[1] <= _FUSED_VOCAB
    if not (fused and temperatures.one):
        torch.sub(logits, logits.amax(1, keepdim=True), out=out)
        logits = temperatures.divide_(out, rows)
    if fused:
        torch.log_softmax(logits, -1, out=out)
    else:
        out.sub_(out.exp().sum(-1, keepdim=True).log())  # this sum is pairwise


def fused_softmax(logits: Tensor, temperatures: Temperatures, out: Tensor) -> bool:
    """Whether torch's softmax of these logits is accurate and nothing is to be done before."""
    return temperatures.one and logits.dtype == out.dtype and logits.shape[1] <= _FUSED_VOCAB


def fold_rows_(log_probs: Tensor, labels: Tensor, *, entropy: bool) -> RowFold:
    """Log-probability of each label and entropy of each row; [R, V] is left as `row_gradient`
    takes it.

    Args:
        log_probs: from `log_softmax_rows`. labels: [R] int64; a negative one marks a row to
            ignore (logprob and entropy 0).
    """
    keep = labels >= 0
    chosen = log_probs.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    logprob = torch.where(keep, chosen, 0.0)
    if not entropy:
        return RowFold(logprob, torch.zeros_like(logprob))
    log_probs.clamp_(min=FLOOR)
    weights = log_probs.exp()
    # torch's normaliser carries a few float32 roundings; a second one costs one pass here.
    total = weights.sum(-1)
    spread = total.log() - weights.mul_(log_probs).sum(-1) / total
    return RowFold(logprob, torch.where(keep, spread, 0.0))


def row_gradient(
    log_probs: Tensor,
    labels: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    rows: slice,
    temperatures: Temperatures,
    out: Tensor,
) -> Tensor:
    """Gradient by the logits, written to `out` [R, V], which may be `log_probs`.

    grad_logprob (onehot - p) - grad_entropy p (log p + entropy), over the temperature; ignored
    rows become 0.

    Args:
        log_probs: from `log_softmax_rows`. labels, entropy, grad_*: of these rows, [R].
        rows: where they lie in the batch.
    """
    if grad_entropy is None:
        weights = torch.exp(log_probs, out=out)
        return weighted_gradient_(weights, labels, grad_logprob, rows, temperatures)
    by_logprob = slopes(labels, grad_logprob, rows, temperatures, out.dtype)
    by_entropy = slopes(labels, grad_entropy, rows, temperatures, out.dtype)
    weights = torch.clamp(log_probs, min=FLOOR, out=out).exp()
    out.mul_(-by_entropy[:, None]).sub_((by_logprob + by_entropy * entropy)[:, None])
    return finish_gradient_(out.mul_(weights), labels, by_logprob)


def weighted_gradient_(
    weights: Tensor, labels: Tensor, grad_logprob: Tensor, rows: slice, temperatures: Temperatures
) -> Tensor:
    """`row_gradient` without entropy, in place of the probabilities [R, V]."""
    by_logprob = slopes(labels, grad_logprob, rows, temperatures, weights.dtype)
    return finish_gradient_(weights.mul_(-by_logprob[:, None]), labels, by_logprob)


def slopes(
    labels: Tensor, grad: Tensor, rows: slice, temperatures: Temperatures, dtype: torch.dtype
) -> Tensor:
    """What comes from above, over the temperature, and 0 for rows to ignore; [R]."""
    return temperatures.divide_(torch.where(labels >= 0, grad, 0.0).to(dtype, copy=True), rows)


def finish_gradient_(out: Tensor, labels: Tensor, by_logprob: Tensor) -> Tensor:
    """Clear the rows to ignore and add what the labels' own logits get."""
    keep = labels >= 0
    # A row to ignore may hold NaN, which 0 * does not clear. Only a CPU is asked: others wait.
    if keep.device.type != "cpu" or not bool(keep.all()):
        out.masked_fill_(~keep[:, None], 0.0)
    return out.scatter_add_(1, labels.clamp_min(0)[:, None], by_logprob[:, None])
