"""Paged key-value blocks as bytes: what a running sample takes along from one vLLM to another.

Blocks travel whole and as they lie in memory: how keys are packed inside a block is the attention
kernel's own business, so the header names the machine's kernel family and everything else that
the bytes are only good for.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch

from rlhfuse.engines.base import TokenIds

HAND_OVER: dict[str, Any] = {"do_remote_decode": True, "do_remote_prefill": False}
"""What a request says to leave its blocks for another instance to read (NIXL)."""


def of_layers(layers: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Layer name -> paged cache [blocks, ...], of the layers that have one."""
    caches = {name: getattr(layer, "kv_cache", None) for name, layer in layers.items()}
    return {name: cache for name, cache in caches.items() if isinstance(cache, torch.Tensor)}


class Freed:
    """Caches whose memory may be given back to the system (a CPU's: vLLM's own sleep does nothing
    there): the tensors stay, their storages are emptied."""

    def __init__(self) -> None:
        self._storages: list[tuple[torch.UntypedStorage, int]] = []

    def free(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Layers may share a storage."""
        storages = [cache.untyped_storage() for cache in caches.values()]
        for storage in {storage.data_ptr(): storage for storage in storages}.values():
            self._storages.append((storage, storage.nbytes()))
            storage.resize_(0)

    def restore(self, caches: Mapping[str, torch.Tensor]) -> None:
        """As large as before, and zero: what is masked out is still multiplied, and must be
        finite."""
        for storage, num_bytes in self._storages:
            storage.resize_(num_bytes)
        self._storages.clear()
        for cache in caches.values():
            cache.zero_()


class BlocksHeader(msgspec.Struct, frozen=True, array_like=True):
    """What serialised blocks were computed with; they are of use only where all of it agrees."""

    kernel: str
    dtype: str
    layer_shapes: tuple[tuple[int, ...], ...]  # of one block, per layer
    num_tokens: int  # whose keys and values are in them
    policy_version: int
    token_checksum: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """Parsed cache bytes: the header, and per layer bytes [blocks, ...] to copy from."""

    header: BlocksHeader
    layers: tuple[torch.Tensor, ...]

    def write(
        self, caches: Sequence[torch.Tensor], block_ids: Sequence[int], *, first: int
    ) -> None:
        """Copy blocks `first`, `first + 1`, ... into `block_ids` of each layer's cache."""
        targets = torch.tensor(list(block_ids), dtype=torch.long)
        for cache, source in zip(caches, self.layers, strict=True):
            chosen = source[first : first + len(targets)]
            cache[targets.to(cache.device)] = chosen.to(cache.device)


def checksum(tokens: TokenIds) -> int:
    """Of the tokens whose keys and values are cached."""
    return zlib.crc32(np.ascontiguousarray(tokens, dtype=np.int32).tobytes())


def header_of(
    caches: Mapping[str, torch.Tensor], tokens: TokenIds, policy_version: int
) -> BlocksHeader:
    """The header for `tokens` in these caches ([blocks, ...] per layer)."""
    tensors = list(caches.values())
    kernel = f"{tensors[0].device.type} {torch.backends.cpu.get_cpu_capability()}"
    return BlocksHeader(
        kernel=kernel,
        dtype=str(tensors[0].dtype),
        layer_shapes=tuple(tuple(t.shape[1:]) for t in tensors),
        num_tokens=len(tokens),
        policy_version=policy_version,
        token_checksum=checksum(tokens),
    )


def serialise(
    caches: Mapping[str, torch.Tensor], block_ids: Sequence[int], header: BlocksHeader
) -> bytes:
    """The blocks of one sample, all layers: header's size, header, raw bytes."""
    encoded = msgspec.msgpack.encode(header)
    parts = [len(encoded).to_bytes(4, "little"), encoded]
    index = torch.tensor(list(block_ids), dtype=torch.long)
    for cache in caches.values():
        chosen = cache[index.to(cache.device)].cpu().contiguous()
        parts.append(chosen.reshape(-1).view(torch.uint8).numpy().tobytes())
    return b"".join(parts)


def parse(cache: bytes, expected: BlocksHeader) -> Blocks | str:
    """The blocks in `cache`, or why they are of no use here.

    Raises:
        ValueError: these are not the bytes of any `serialise`.
    """
    try:
        size = int.from_bytes(cache[:4], "little")
        header = msgspec.msgpack.decode(cache[4 : 4 + size], type=BlocksHeader)
    except msgspec.MsgspecError as error:
        raise ValueError(f"cache: these are not the bytes of a cache ({error})") from error
    for name in header.__struct_fields__:
        theirs, ours = getattr(header, name), getattr(expected, name)
        if theirs != ours:
            return f"its {name} is {theirs}, here {ours} is needed"
    return _layers(header, memoryview(cache)[4 + size :])


def _layers(header: BlocksHeader, data: memoryview) -> Blocks:
    dtype: torch.dtype = getattr(torch, header.dtype.removeprefix("torch."))
    block_bytes = [int(np.prod(shape)) * dtype.itemsize for shape in header.layer_shapes]
    count, rest = divmod(len(data), sum(block_bytes))
    if rest or not count:
        raise ValueError(f"cache: {len(data)} bytes are not a whole number of blocks")
    layers = []
    start = 0
    for shape, size in zip(header.layer_shapes, block_bytes, strict=True):
        raw = bytearray(data[start : start + count * size])
        layers.append(torch.frombuffer(raw, dtype=dtype).reshape(count, *shape))
        start += count * size
    return Blocks(header, tuple(layers))


def pack_transfer(transfer: dict[str, Any] | None, policy_version: int) -> bytes:
    """Where a receiver finds a sample's blocks, as a cache; empty where there are none."""
    return msgspec.json.encode((policy_version, transfer)) if transfer else b""


def unpack_transfer(cache: bytes, policy_version: int) -> dict[str, Any] | None:
    """`pack_transfer` undone; None where it is empty or of other weights."""
    if not cache:
        return None
    version, transfer = msgspec.json.decode(cache, type=tuple[int, dict[str, Any]])
    return transfer if version == policy_version else None
