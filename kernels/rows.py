"""Rows of float32 logits on any device: the plain-torch core of both log-probability functions.

Every step is per row, so a row's result does not depend on the other rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this a shifted logit adds exactly 0 to every sum (float32 and float64 alike), and -inf
# becomes a number: 0 * -inf would be NaN.
FLOOR = -1.0e4


@dataclass(frozen=True, slots=True)
class RowFold:
    """What one pass over the vocabulary leaves of each row, [R] each.

    `top` is the largest scaled logit, `log_total` the log of the sum of exponentials of the
    scaled logits minus `top`: apart, so that a shift of all logits costs no accuracy.
    """

    logprob: Tensor
    entropy: Tensor
    top: Tensor
    log_total: Tensor


def scale_rows_(
    block: Tensor, temperature: float, rows: slice, temperatures: Tensor | None
) -> Tensor:
    """Divide [R, V] by a number, or by these rows' own temperatures, in place."""
    if temperatures is not None:
        return block.div_(temperatures[rows].to(block.dtype)[:, None])
    return block if temperature == 1.0 else block.div_(temperature)


def fold_rows_(scaled: Tensor, labels: Tensor, *, entropy: bool) -> RowFold:
    """Log-probability of each label and entropy of each row; overwrites `scaled` [R, V].

    Args:
        labels: [R] int64; a negative one marks a row to ignore (logprob and entropy 0).
    """
    keep = labels >= 0
    top = scaled.amax(-1, keepdim=True)
    shifted = scaled.sub_(top)
    chosen = shifted.gather(1, labels.clamp_min(0)[:, None]).squeeze(1)
    if entropy:
        shifted.clamp_(min=FLOOR)
        weights = shifted.exp()
        total = weights.sum(-1)
        spread = total.log() - weights.mul_(shifted).sum(-1) / total
    else:
        total = shifted.exp_().sum(-1)
        spread = torch.zeros_like(total)
    log_total = total.log()
    zero = torch.zeros((), dtype=scaled.dtype, device=scaled.device)
    return RowFold(
        torch.where(keep, chosen - log_total, zero),
        torch.where(keep, spread, zero),
        top.squeeze(1),
        log_total,
    )


def row_gradient_(
    scaled: Tensor,
    labels: Tensor,
    top: Tensor,
    log_total: Tensor,
    entropy: Tensor | None,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
) -> Tensor:
    """Gradient by the scaled logits [R, V], written over `scaled`.

    dz = grad_logprob (onehot - p) - grad_entropy p (log p + entropy); ignored rows become 0.
    """
    keep = labels >= 0
    grad_logprob = torch.where(keep, grad_logprob, 0.0).to(scaled.dtype)
    log_p = scaled.sub_(top[:, None]).sub_(log_total[:, None])
    if grad_entropy is not None and entropy is not None:
        log_p.clamp_(min=FLOOR)
        grad_entropy = torch.where(keep, grad_entropy, 0.0).to(scaled.dtype)
        slope = (log_p + entropy[:, None]).mul_(grad_entropy[:, None])
        slope.add_(grad_logprob[:, None])
        gradient = log_p.exp_().mul_(slope).neg_()
    else:
        gradient = log_p.exp_().mul_(-grad_logprob[:, None])
    # A row to ignore may hold NaN, which 0 * does not clear.
    gradient.masked_fill_(~keep[:, None], 0.0)
    gradient.scatter_add_(1, labels.clamp_min(0)[:, None], grad_logprob[:, None])
    return gradient
