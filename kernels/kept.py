"""Rows of logits renormalised over the tokens that a sampler kept, from ragged lists of them.

There are few kept tokens beside a vocabulary, so their numbers are float64. Each row is added up by
itself, so that its bits do not depend on the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfuse.kernels.dispatch import Path, choose
from rlhfuse.kernels.packed import segment_max, segment_sum
from rlhfuse.kernels.reference import KeptTokens
from rlhfuse.kernels.rows import RowFold, Temperatures, slopes


@dataclass(frozen=True, slots=True)
class KeptRows:
    """What some rows kept: token `ids` [K], the row of each [K], and where each row's begin and
    end [R + 1]; int64, counted from the first of these rows."""

    ids: Tensor
    owners: Tensor
    bounds: Tensor

    @classmethod
    def of(cls, ids: Tensor, cu: Tensor, rows: slice) -> "KeptRows":
        """Those of a range of all rows; `ids` and `cu` as in `KeptTokens`."""
        bounds = cu[rows.start : rows.stop + 1].long()
        own = ids[int(bounds[0]) : int(bounds[-1])].long()
        numbers = torch.arange(bounds.numel() - 1, device=ids.device)
        owners = torch.repeat_interleave(numbers, bounds.diff(), output_size=own.numel())
        return cls(own, owners, bounds - bounds[0])


def check_kept(kept: KeptTokens, labels: Tensor) -> None:
    """Refuse lists that are not those of these labels [T] (a negative one is ignored).

    Looks at shapes only where the values are on another device than the CPU.

    Raises:
        ValueError: wrong shapes, or a label that is not among what was kept for it.
    """
    if kept.cu.shape != (labels.numel() + 1,):
        raise ValueError(
            f"kept.cu must be one longer than the {labels.numel()} labels, "
            f"not {tuple(kept.cu.shape)}"
        )
    if labels.device.type != "cpu" or not labels.numel():
        return
    rows = KeptRows.of(kept.ids, kept.cu, slice(0, labels.numel()))
    found = segment_sum((rows.ids == labels[rows.owners]).double(), rows.bounds)
    lost = ((found == 0) & (labels >= 0)).nonzero()[:, 0].tolist()
    if lost:
        raise ValueError(
            f"kept: label {int(labels[lost[0]])} of token {lost[0]} is not among the tokens kept "
            "there; a sampler cannot have drawn it"
        )


def fold_kept(
    logits: Tensor, labels: Tensor, kept: KeptRows, rows: slice, temperatures: Temperatures
) -> RowFold:
    """Fold [R, V] logits over what was kept of them; they are left alone.

    Args:
        labels: int64 [R], each among what its row kept; a negative one marks a row to ignore.
        rows: where they lie in the batch.
    """
    if logits.dtype == torch.float32 and choose(logits.device) is Path.TRITON:
        from rlhfuse.kernels import triton_kept  # triton is optional

        per_row = None if temperatures.per_token is None else temperatures.per_token[rows]
        source = triton_kept.Source(logits, None, None, temperatures.number, per_row)
        return RowFold(*triton_kept.fold(source, labels, kept.ids, kept.bounds).unbind())
    keep, divisors = labels >= 0, _divisors(labels, temperatures, rows)
    picked = logits[kept.owners, kept.ids].double()
    top = segment_max(picked, kept.bounds)
    shifted = (picked - top[kept.owners]) / divisors[kept.owners]
    weights = shifted.exp()
    total = segment_sum(weights, kept.bounds)
    moment = segment_sum(torch.where(weights > 0.0, weights * shifted, 0.0), kept.bounds)
    own = logits.gather(1, labels.clamp_min(0)[:, None]).squeeze(1).double()
    logprob = (own - top) / divisors - total.log()
    entropy = (total.log() - moment / total).clamp_min(0.0)
    numbers = (torch.where(keep, part, 0.0) for part in (logprob, entropy, top, total))
    return RowFold(*(part.to(_narrow(logits)) for part in numbers))


def kept_gradient(
    logits: Tensor,
    labels: Tensor,
    kept: KeptRows,
    fold: RowFold,
    grad_logprob: Tensor,
    grad_entropy: Tensor | None,
    rows: slice,
    temperatures: Temperatures,
) -> Tensor:
    """Gradient by the kept logits, [K]; that by all others is 0.

    grad_logprob (onehot - p) - grad_entropy p (log p + entropy), over the temperature; 0 in
    ignored rows. Arguments as `fold_kept`, `fold` and `grad_*` [R].
    """
    divisors = _divisors(labels, temperatures, rows)
    picked = logits[kept.owners, kept.ids].double()
    total = torch.where(labels >= 0, fold.total, 1.0).double()
    log_p = (picked - fold.shift.double()[kept.owners]) / divisors[kept.owners]
    log_p -= total.log()[kept.owners]
    p, dtype = log_p.exp(), fold.total.dtype
    by_logprob = slopes(labels, grad_logprob, rows, temperatures, dtype).double()[kept.owners]
    slope = torch.where(kept.ids == labels[kept.owners], 1.0, 0.0).sub_(p).mul_(by_logprob)
    if grad_entropy is not None:
        by_entropy = slopes(labels, grad_entropy, rows, temperatures, dtype).double()
        bend = p * (log_p + fold.entropy.double()[kept.owners])
        slope -= torch.where(p > 0.0, bend * by_entropy[kept.owners], 0.0)
    ignored = (labels < 0)[kept.owners]  # they may hold NaN
    return slope.masked_fill_(ignored, 0.0).to(dtype)


def _divisors(labels: Tensor, temperatures: Temperatures, rows: slice) -> Tensor:
    """Temperatures of these rows, float64 [R]."""
    if temperatures.per_token is not None:
        return temperatures.per_token[rows].double()
    return torch.full(labels.shape, temperatures.number, dtype=torch.float64, device=labels.device)


def _narrow(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32
