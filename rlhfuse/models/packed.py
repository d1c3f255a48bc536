"""Packed batches: several samples in one row of tokens, without padding between them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

ROW_MULTIPLE = 16
"""Rows are filled up to a multiple of this. Matrix products with one to three rows take other
kernels than larger ones, and vectorised elementwise loops end in a scalar tail: with at least 16
rows, and a multiple of them, a sample's numbers do not depend on what it is packed with."""


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """Samples laid end to end, then `num_rows - num_tokens` dummy rows (one sequence of token 0).

    token_ids: int64 [num_rows]. position_ids: int64 [num_rows], from 0 in every sample.
    lengths: tokens of each sample. cu_seqlens: int32 [N + 1], where each sample starts and ends.
    The dummy rows travel between pipeline stages and are dropped by the last one. `rectangular`:
    a padded batch, all lengths are that of the longest sample; attention takes them together.
    """

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[int, ...]
    cu_seqlens: torch.Tensor
    rectangular: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of the hidden states between stages, dummy rows included."""
        return self.token_ids.shape[0]

    @property
    def num_tokens(self) -> int:
        """Rows that belong to samples: those of the last stage's result."""
        return sum(self.lengths)

    def split(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of `rows` [num_tokens, ...], one per sample."""
        assert rows.shape[0] == self.num_tokens, f"{rows.shape[0]} rows, {self.num_tokens=}"
        return tuple(torch.split(rows, list(self.lengths)))


def padded_rows(num_tokens: int) -> int:
    """Rows of a packed batch of `num_tokens` tokens."""
    return max(1, -(-num_tokens // ROW_MULTIPLE)) * ROW_MULTIPLE


def laid_out(lengths: Sequence[int], *, padded: bool) -> tuple[int, ...]:
    """Rows of each sample: its tokens, or those of the longest one in a padded batch."""
    return (max(lengths, default=0),) * len(lengths) if padded else tuple(lengths)


def pack(
    samples: Sequence[npt.NDArray[np.int32]], device: torch.device | str, *, padded: bool = False
) -> PackedBatch:
    """Pack token arrays in the order given; `padded`: each filled up with token 0, behind what a
    causal model reads, to the length of the longest. Raises ValueError for none, or for an empty
    one."""
    if not samples or min(map(len, samples)) == 0:
        found = tuple(map(len, samples))
        raise ValueError(f"packed batch: every sample needs at least one token, got {found}")
    if padded:
        longest = max(map(len, samples))
        samples = [np.pad(tokens, (0, longest - len(tokens))) for tokens in samples]
    lengths = tuple(len(tokens) for tokens in samples)
    num_tokens = sum(lengths)
    token_ids = np.zeros(padded_rows(num_tokens), dtype=np.int64)
    token_ids[:num_tokens] = np.concatenate(samples)
    spans = [*lengths, len(token_ids) - num_tokens]
    position_ids = np.concatenate([np.arange(span, dtype=np.int64) for span in spans])
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return PackedBatch(
        token_ids=torch.from_numpy(token_ids).to(device),
        position_ids=torch.from_numpy(position_ids).to(device),
        lengths=lengths,
        cu_seqlens=torch.from_numpy(cu_seqlens).to(device),
        rectangular=padded,
    )
