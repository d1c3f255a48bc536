"""Dropout that depends on which token of which sample a row is, and not on the batch around it.

What is dropped is a function of (stream, sample, position, layer, column), as tokens are of (seed,
position): so an update with dropout, too, is the same under every schedule and, to rounding, for
every cut into stages, micro-batches and replicas; and to compute a stage again drops the same.
"""

import torch
from torch import nn

from rlhfuse.kernels.keyed import kept, key_of, row_keys
from rlhfuse.models.packed import PackedBatch


class Rows:
    """The keys of the rows that a stage is at work on."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        """int64 [rows]; None: nothing is dropped."""

    def set(self, batch: PackedBatch, sample_ids: torch.Tensor, stream: int) -> None:
        """The rows of `batch` come next, of the samples `sample_ids` (int64 [N]). `stream`: what
        two updates, or two models, do not share."""
        own = row_keys(sample_ids, torch.full_like(sample_ids, stream))
        lengths = torch.tensor(batch.lengths, device=own.device)
        seeds = torch.zeros_like(batch.position_ids)  # the dummy rows', too
        seeds[: batch.num_tokens] = own.repeat_interleave(lengths)
        self.keys = row_keys(seeds, batch.position_ids)


class RowDropout(nn.Module):
    """In place of an `nn.Dropout`; `name` tells it from the model's others."""

    def __init__(self, rate: float, name: str, rows: Rows) -> None:
        super().__init__()
        self._rate = rate
        self._own = key_of(name)
        self._rows = rows

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [1, rows, H] or [rows, H]."""
        keys = self._rows.keys
        if keys is None or not self.training:
            return hidden
        mask = kept(row_keys(keys, torch.full_like(keys, self._own)), hidden.shape[-1], self._rate)
        return torch.where(mask.view_as(hidden), hidden / (1 - self._rate), 0.0)
