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

# torch's own log_softmax adds a row up in order, in float32: at 32,000 columns the largest error
# was 6e-6 without a temperature and 1.3e-5 at 0.7 (pairwise sums: 1.2e-6). It is used up to here
# where nothing is to be divided, because it saves three passes, and up to the second otherwise.
_FUSED_VOCAB = 32_768
_FUSED_SCALED_VOCAB = 4096


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


@dataclass(frozen=True, slots=True)
class Formed:
    """A loss formed with its gradients: logprob and entropy [T], and gradients not narrower than
    float32 (that by hidden may be in hidden's own type)."""

    loss: Tensor
    logprob: Tensor
    entropy: Tensor
    by_hidden: Tensor
    by_weight: Tensor
    by_bias: Tensor | None


def log_softmax_rows(logits: Tensor, rows: slice, temperatures: Temperatures, out: Tensor) -> None:
    """log softmax(logits / temperature) of these rows, [R, V], written to contiguous `out`.

    Both ways work row by row, so no row depends on the others. The maximum goes before the
    division: a shift of all logits then costs no accuracy.

    Args:
        logits: [R, V] of any layout and float type; may be `out`. rows: where they lie in the
            batch.
    """
    _log_softmax(logits, None, rows, temperatures, out)


def log_softmax_labels(
    logits: Tensor, labels: Tensor, rows: slice, temperatures: Temperatures, out: Tensor
) -> Tensor:
    """`log_softmax_rows`, and the log-probabilities of the labels [R] (0 for negative ones).

    Where there is something to divide by, a label's own steps run in float64, so that only one
    float32 rounding is left of the three in `out`.
    """
    chosen = _log_softmax(logits, labels.clamp_min(0)[:, None], rows, temperatures, out)
    return torch.where(labels >= 0, chosen, 0.0)


def _log_softmax(
    logits: Tensor, index: Tensor | None, rows: slice, temperatures: Temperatures, out: Tensor
) -> Tensor:
    """The log-probabilities at `index`, [R]; nothing of use without it."""
    if logits.shape[1] == 0:
        return out.new_zeros(out.shape[0])
    if logits.dtype != out.dtype:
        logits = out.copy_(logits)
    fused = logits.shape[1] <= (_FUSED_VOCAB if temperatures.one else _FUSED_SCALED_VOCAB)
    if fused and temperatures.one:
        torch.log_softmax(logits, -1, out=out)
        return out[:, 0] if index is None else out.gather(1, index).squeeze(1)
    top = logits.amax(1, keepdim=True)
    ahead = None if index is None else logits.gather(1, index).double().sub_(top)
    logits = temperatures.divide_(torch.sub(logits, top, out=out), rows)
    if fused:
        torch.log_softmax(logits, -1, out=out)
        log_total = None if index is None else out.amax(1).neg_()
    else:
        log_total = out.exp().sum(-1).log()  # this sum is pairwise
        out.sub_(log_total[:, None])
    if ahead is None or log_total is None:
        return out[:, 0]
    return temperatures.divide_(ahead.squeeze(1), rows).sub_(log_total).to(out.dtype)


def fused_softmax(logits: Tensor, temperatures: Temperatures, out: Tensor) -> bool:
    """Whether torch's softmax of these logits is accurate and nothing is to be done before."""
    return temperatures.one and logits.dtype == out.dtype and logits.shape[1] <= _FUSED_VOCAB


def fold_rows_(log_probs: Tensor, logprob: Tensor, labels: Tensor, *, entropy: bool) -> RowFold:
    """Log-probability of each label and entropy of each row; [R, V] is left as `row_gradient`
    takes it.

    Args:
        log_probs, logprob: from `log_softmax_labels`. labels: [R] int64; a negative one marks a
            row to ignore (logprob and entropy 0).
    """
    if not entropy:
        return RowFold(logprob, torch.zeros_like(logprob))
    log_probs.clamp_(min=FLOOR)
    weights = log_probs.exp()
    # torch's normaliser carries a few float32 roundings; a second one costs one pass here.
    total = weights.sum(-1)
    spread = total.log() - weights.mul_(log_probs).sum(-1) / total
    return RowFold(logprob, torch.where(labels >= 0, spread, 0.0))


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
