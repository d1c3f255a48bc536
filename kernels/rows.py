"""Rows of float32 logits on any device: the plain-torch core of the log-probability functions.

Every step is per row, so a row's result does not depend on the other rows. Passes over the
vocabulary are what costs, so there are as few as torch allows, and none allocates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a shifted logit adds exactly 0 to every sum (float32 and float64 alike), and -inf
# becomes a number: 0 * -inf would be NaN.
FLOOR = -1.0e4


@dataclass(frozen=True, slots=True)
class Temperatures:
    """A number, or one per token of the whole batch (then the number is not used)."""

    number: float
    per_token: Tensor | None

    def divide_(self, block: Tensor, rows: slice) -> Tensor:
        """Divide the block of these rows, [R] or [R, V], in place."""
        if self.per_token is not None:
            own = self.per_token[rows].to(block.dtype)
            return block.div_(own if block.dim() == 1 else own[:, None])
        return block if self.number == 1.0 else block.div_(self.number)


@dataclass(frozen=True, slots=True)
class RowFold:
    """What one pass over the vocabulary leaves of each row, [R] each.

    `total` is the sum of exponentials of the shifted logits (see `fold_rows_`).
    """

    logprob: Tensor
    entropy: Tensor
    total: Tensor


def fold_rows_(shifted: Tensor, labels: Tensor, *, entropy: bool) -> RowFold:
    """Log-probability of each label and entropy of each row.

    Overwrites `shifted` as `prepare_rows_` does, ready for `row_gradient`.

    Args:
        shifted: [R, V], (logits - row maximum) / temperature.
        labels: [R] int64; a negative one marks a row to ignore (logprob and entropy 0).
    """
    keep = labels >= 0
    chosen = shifted.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    block = prepare_rows_(shifted, entropy=entropy)
    if entropy:
        weights = block.exp()
        total = weights.sum(-1)
        spread = torch.where(keep, total.log() - weights.mul_(block).sum(-1) / total, 0.0)
    else:
        total = block.sum(-1)
        spread = torch.zeros_like(total)
    return RowFold(torch.where(keep, chosen - total.log(), 0.0), spread, total)


def prepare_rows_(shifted: Tensor, *, entropy: bool) -> Tensor:
    """What the gradient is made of, in place: the exponentials, or with entropy the shifted
    logits themselves, freed of -inf."""
    return shifted.clamp_(min=FLOOR) if entropy else shifted.exp_()


def row_gradient(
    block: Tensor,
    labels: Tensor,
    total: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    rows: slice,
    temperatures: Temperatures,
    out: Tensor,
) -> Tensor:
    """Gradient by the logits, written to `out` [R, V], which may be `block`.

    grad_logprob (onehot - p) - grad_entropy p (log p + entropy), over the temperature; ignored
    rows become 0.

    Args:
        block: as `prepare_rows_` leaves it. labels, total, entropy, grad_*: of these rows, [R].
        rows: where they lie in the batch.
    """
    keep = labels >= 0
    by_logprob = temperatures.divide_(
        torch.where(keep, grad_logprob, 0.0).to(block.dtype, copy=True), rows
    )
    if grad_entropy is None:
        torch.mul(block, (-by_logprob / total)[:, None], out=out)
    else:
        by_entropy = temperatures.divide_(
            torch.where(keep, grad_entropy, 0.0).to(block.dtype, copy=True), rows
        )
        level = by_logprob + by_entropy * (entropy - total.log())
        weights = block.exp()
        torch.mul(block, (-by_entropy / total)[:, None], out=out)
        out.add_((-level / total)[:, None]).mul_(weights)
    # A row to ignore may hold NaN, which 0 * does not clear. Only a CPU is asked: others wait.
    if keep.device.type != "cpu" or not bool(keep.all()):
        out.masked_fill_(~keep[:, None], 0.0)
    return out.scatter_add_(1, labels.clamp_min(0)[:, None], by_logprob[:, None])
