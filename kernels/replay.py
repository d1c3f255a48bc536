"""What a truncating sampler keeps, found again from the head, and log-probabilities among it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfuse.kernels.head_chunks import chunk_room, chunks, head_logits
from rlhfuse.kernels.kept import KeptRows, fold_kept
from rlhfuse.kernels.precision import without_autocast
from rlhfuse.kernels.reference import KeptTokens, accumulation_dtype
from rlhfuse.kernels.rows import Temperatures, fold_rows

Keep = Callable[[slice, Tensor], Tensor]
"""(rows, their logits [R, V], which it may change) -> what a sampler keeps of them, bool [R, V]."""


@dataclass(frozen=True, slots=True)
class Replay:
    """Log-probability of each label in the whole distribution, and among what was kept, [T] each;
    and what was kept."""

    logprob: Tensor
    replayed: Tensor
    kept: KeptTokens


@torch.no_grad()
def replay(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    keep: Keep,
    *,
    most: Tensor,
    temperature: float = 1.0,
) -> Replay:
    """One product with the head per chunk of tokens; [T, V] never exists.

    As in `linear_logprob` a token's result does not depend on the others, if that of `keep` does
    not. A label always counts as kept: rounding may put a drawn token just beyond an edge.

    Args:
        hidden: [T, H]. weight: [V, H]. labels: int64 [T].
        most: int64 [T]. Where more would be kept, only so many of the likeliest (and the label)
            are: what bounds the memory of the lists.
    """
    dtype, given = accumulation_dtype(hidden), Temperatures(temperature, None)
    out = torch.empty(2, hidden.shape[0], dtype=dtype, device=hidden.device)
    wide, ids, counts = weight.to(dtype), [], []
    room = chunk_room(out, hidden.shape[0], weight.shape[0])
    with without_autocast(hidden):
        for rows in chunks(hidden.shape[0], weight.shape[0]):
            logits = head_logits(hidden[rows].to(dtype), wide, None, room[: rows.stop - rows.start])
            own = labels[rows]
            out[0, rows] = fold_rows(logits, own, rows, given, entropy=False).logprob
            drawn = logits.gather(1, own[:, None])
            mask = _at_most(keep(rows, logits), logits, most[rows])
            logits.scatter_(1, own[:, None], drawn)
            mask.scatter_(1, own[:, None], True)
            owners, found = mask.nonzero(as_tuple=True)
            count = mask.sum(1)
            bounds = torch.nn.functional.pad(count.cumsum(0), (1, 0))
            held = KeptRows(found, owners, bounds)
            out[1, rows] = fold_kept(logits, own, held, rows, given).logprob
            ids.append(found.int())
            counts.append(count)
    cu = torch.zeros(labels.numel() + 1, dtype=torch.int64, device=hidden.device)
    if counts:
        cu[1:] = torch.cat(counts).cumsum(0)
    everything = torch.cat(ids) if ids else labels.new_empty(0, dtype=torch.int32)
    return Replay(out[0], out[1], KeptTokens(everything, cu))


def _at_most(mask: Tensor, logits: Tensor, most: Tensor) -> Tensor:
    """The mask with at most so many kept in a row [R], the likeliest."""
    for row in (mask.sum(1) > most).nonzero()[:, 0].tolist():
        likeliest = logits[row].topk(int(most[row])).indices
        mask[row] = False
        mask[row, likeliest] = True
    return mask
