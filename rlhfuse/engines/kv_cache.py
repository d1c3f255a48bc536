"""The key-value cache of the torch engine: one row of tokens per running sample."""

from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from rlhfuse.models.stage import ModelConfig

FIRST_CAPACITY = 64


class CacheHeader(msgspec.Struct, frozen=True, array_like=True):
    """What a serialised cache was computed with; it is of use only where all of this agrees."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    num_tokens: int
    dtype: str
    policy_version: int
    token_checksum: int


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of one token's keys and values."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: ModelConfig, dtype: torch.dtype) -> "CacheShape":
        head_dim = getattr(config, "head_dim", None)
        return cls(
            num_layers=config.num_hidden_layers,
            num_kv_heads=config.num_key_value_heads or config.num_attention_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of cache per token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVCache:
    """Keys and values as [rows, kv_heads, capacity, head_dim] per layer, rows used from 0 on.

    A fixed number of tokens is taken once, as one flat buffer per layer and kind, and laid out
    anew when the capacity, a power of two over the longest row, changes: memory never grows, and
    a decode step reads plain strided views. Where all rows fit at full length, they have it from
    the start.
    """

    def __init__(
        self,
        shape: CacheShape,
        *,
        cache_tokens: int,
        max_rows: int,
        max_length: int,
        device: torch.device,
    ) -> None:
        assert cache_tokens >= max_length
        self.shape = shape
        self._cache_tokens = cache_tokens
        self._max_rows = max_rows
        self._max_length = max_length
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._roomy = max_rows * max_length <= cache_tokens
        self.capacity = self._capacity_for(1)
        self.allocate()

    @property
    def allocated(self) -> bool:
        return bool(self._buffers)

    def allocate(self) -> None:
        """Take the memory (on a CPU the system hands it out when it is first touched). Zeros: what
        is masked out is still multiplied, and must be finite."""
        size = self._cache_tokens * self.shape.num_kv_heads * self.shape.head_dim
        self._buffers = [
            torch.zeros(size, dtype=self.shape.dtype, device=self._device)
            for _ in range(2 * self.shape.num_layers)
        ]

    def free(self) -> None:
        """Give the memory back."""
        self._buffers = []

    def rows_at(self, length: int) -> int:
        """How many rows there may be once the longest has `length` tokens."""
        return min(self._max_rows, self._cache_tokens // self._capacity_for(length))

    def _capacity_for(self, length: int) -> int:
        assert length <= self._max_length
        capacity = self._max_length if self._roomy else FIRST_CAPACITY
        while capacity < length:
            capacity *= 2
        return min(capacity, self._max_length)

    def keys(self, layer: int) -> torch.Tensor:
        """[rows, kv_heads, capacity, head_dim] of a layer, a view."""
        return self._view(2 * layer, self.capacity)

    def values(self, layer: int) -> torch.Tensor:
        """[rows, kv_heads, capacity, head_dim] of a layer, a view."""
        return self._view(2 * layer + 1, self.capacity)

    def _view(self, index: int, capacity: int) -> torch.Tensor:
        row_size = self.shape.num_kv_heads * capacity * self.shape.head_dim
        rows = self._buffers[index].shape[0] // row_size
        flat = self._buffers[index][: rows * row_size]
        return flat.view(rows, self.shape.num_kv_heads, capacity, self.shape.head_dim)

    def reserve(self, length: int, num_rows: int, used: int) -> None:
        """Make room for rows of `length` tokens, keeping the first `used` of `num_rows` rows."""
        capacity = self._capacity_for(length)
        if capacity == self.capacity:
            return
        for index in range(len(self._buffers)):
            kept = self._view(index, self.capacity)[:num_rows, :, :used].clone()
            self._view(index, capacity)[:num_rows, :, :used] = kept
        self.capacity = capacity

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of a row over another row."""
        for index in range(len(self._buffers)):
            view = self._view(index, self.capacity)
            view[target, :, :length] = view[source, :, :length]

    def export_row(self, row: int, length: int, policy_version: int, checksum: int) -> bytes:
        """A row's first `length` tokens: a msgpack header, its size before it, then raw bytes."""
        header = msgspec.msgpack.encode(self._header(length, policy_version, checksum))
        parts = [len(header).to_bytes(4, "little"), header]
        for index in range(len(self._buffers)):
            tokens = self._view(index, self.capacity)[row, :, :length].contiguous().cpu()
            parts.append(tokens.view(torch.uint8).numpy().tobytes())
        return b"".join(parts)

    def import_row(
        self, row: int, length: int, cache: bytes, policy_version: int, checksum: int
    ) -> str:
        """Fill a row from `export_row`'s bytes. Returns why not, or an empty string. Raises
        ValueError for bytes that are no cache at all."""
        header, payload = _parse(cache)
        mine = self._header(length, policy_version, checksum)
        if header != mine:
            return f"it was computed with {header}, here it is {mine}"
        shape = (len(self._buffers), self.shape.num_kv_heads, length, self.shape.head_dim)
        if payload.nbytes != length * self.shape.token_bytes:
            raise ValueError(f"cache: {payload.nbytes} bytes for {length} tokens; it was cut short")
        tokens = torch.from_numpy(payload).view(self.shape.dtype).view(shape)
        for index in range(len(self._buffers)):
            self._view(index, self.capacity)[row, :, :length] = tokens[index]
        return ""

    def _header(self, length: int, policy_version: int, checksum: int) -> CacheHeader:
        return CacheHeader(
            self.shape.num_layers,
            self.shape.num_kv_heads,
            self.shape.head_dim,
            length,
            str(self.shape.dtype),
            policy_version,
            checksum,
        )


def _parse(cache: bytes) -> tuple[CacheHeader, np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    size = int.from_bytes(cache[:4], "little")
    try:
        header = msgspec.msgpack.decode(cache[4 : 4 + size], type=CacheHeader)
    except msgspec.DecodeError as error:
        raise ValueError(f"cache: not the bytes of a key-value cache: {error}") from error
    payload = np.frombuffer(cache, dtype=np.uint8, offset=4 + size).copy()
    return header, payload
