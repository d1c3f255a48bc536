"""Packed batches: T tokens of N sequences laid end to end, with `cu_seqlens` int32 [N + 1].

Sequence i owns the tokens ``cu_seqlens[i] : cu_seqlens[i + 1]``; it may be empty.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor


def check_packed(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Refuse a `cu_seqlens` that does not describe `num_tokens` packed tokens.

    Looks at shape and type only where the values are on another device than the CPU.

    Raises:
        ValueError: wrong shape, type, or (on the CPU) values.
    """
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be a 1-D integer tensor of at least one entry, "
            f"not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    if cu_seqlens.device.type != "cpu":
        return
    bounds = cu_seqlens.numpy()  # a few microseconds, where torch takes twenty
    first, last = int(bounds[0]), int(bounds[-1])
    if first != 0 or last != num_tokens or np.less(bounds[1:], bounds[:-1]).any():
        raise ValueError(
            f"cu_seqlens must rise from 0 to the number of tokens {num_tokens}, "
            f"not from {first} to {last}"
        )


def lengths(cu_seqlens: Tensor) -> Tensor:
    """Tokens of each sequence, int64 [N]."""
    return cu_seqlens.diff().long()


def sequence_ids(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The sequence that owns each token, int64 [T]."""
    counts = lengths(cu_seqlens)
    ids = torch.arange(counts.numel(), device=cu_seqlens.device)
    return torch.repeat_interleave(ids, counts, output_size=num_tokens)


def expand(per_sequence: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """Give every token the number of its sequence: [N] -> [T]."""
    return torch.repeat_interleave(per_sequence, lengths(cu_seqlens), output_size=num_tokens)


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Float64 sum of each sequence's tokens, [T] -> [N]; 0 for an empty one. No gradient.

    Each sum runs over its own tokens only, so it does not depend on the other sequences.
    """
    return _over_segments(values, cu_seqlens, "sum")


def segment_max(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Float64 maximum of each sequence's tokens, [T] -> [N]; 0 for an empty one. No gradient."""
    return _over_segments(values, cu_seqlens, "max")


def _over_segments(values: Tensor, cu_seqlens: Tensor, what: Literal["sum", "max"]) -> Tensor:
    values = values.detach().double()
    if values.numel() == 0:
        return torch.zeros(cu_seqlens.numel() - 1, dtype=torch.float64, device=values.device)
    if values.device.type == "cpu":
        bounds = cu_seqlens.numpy()
        occupied = bounds[1:] > bounds[:-1]
        found = np.zeros(len(occupied))
        # Sums are pairwise, and several times faster than torch's.
        reduce = np.add if what == "sum" else np.maximum
        found[occupied] = reduce.reduceat(values.numpy(), bounds[:-1][occupied])
        return torch.from_numpy(found)
    reduced: Tensor = torch.segment_reduce(
        values,
        what,
        lengths=lengths(cu_seqlens),
        unsafe=True,
        initial=0.0 if what == "sum" else -torch.inf,
    )
    return torch.where(lengths(cu_seqlens) > 0, reduced, 0.0)
