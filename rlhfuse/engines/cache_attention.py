"""Attention over the key-value cache: the engine's two kinds of `models.attention.Attend`."""

import torch
from torch.nn import functional

from rlhfuse.engines.kv_cache import KVCache
from rlhfuse.models.attention import PackedAttention
from rlhfuse.models.packed import PackedBatch


class PrefillAttention:
    """Packed attention that also leaves keys and values in consecutive cache rows."""

    def __init__(self, cache: KVCache, batch: PackedBatch, first_row: int) -> None:
        self._cache = cache
        self._lengths = batch.lengths
        self._first_row = first_row
        self._attend = PackedAttention(batch.lengths, batch.cu_seqlens)

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        start = 0
        for row, length in enumerate(self._lengths, start=self._first_row):
            keys[row, :, :length] = key[0, :, start : start + length]
            values[row, :, :length] = value[0, :, start : start + length]
            start += length
        return self._attend(layer, query, key, value, scaling)


class DecodeAttention:
    """One new token per cache row against that row's past; what is beyond a row's own length is
    masked out. Query heads of one key-value head are attended together."""

    def __init__(
        self, cache: KVCache, positions: torch.Tensor, *, longest: int, dtype: torch.dtype
    ) -> None:
        self._cache = cache
        self._positions = positions
        self._longest = longest
        self._rows = torch.arange(len(positions), device=positions.device)
        beyond = torch.arange(longest, device=positions.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=positions.device)
        self._mask = mask.masked_fill_(beyond, -torch.inf)[:, None, None]

    def __call__(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        keys, values = self._cache.keys(layer), self._cache.values(layer)
        keys[self._rows, :, self._positions] = key[0].transpose(0, 1)
        values[self._rows, :, self._positions] = value[0].transpose(0, 1)
        num_rows, kv_heads, head_dim = len(self._rows), keys.shape[1], keys.shape[3]
        grouped = query[0].transpose(0, 1).reshape(num_rows, kv_heads, -1, head_dim)
        output = functional.scaled_dot_product_attention(
            grouped,
            keys[:num_rows, :, : self._longest],
            values[:num_rows, :, : self._longest],
            attn_mask=self._mask,
            scale=scaling,
        )
        return output.reshape(1, num_rows, -1, head_dim)
