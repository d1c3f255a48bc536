"""Sending and receiving weights, tensor by tensor, with proof of arrival."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import torch

from rlhfuse.messages import FetchTensor, PeerReply, Refused, Role, TensorBytes, TensorSource
from rlhfuse.transport import PeerClient
from rlhfuse.weights.plan import combined_digest

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The raw bytes of a tensor, row-major."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return bytes(flat.numpy())


def tensor_digest(data: bytes, dtype: str, shape: Sequence[int]) -> str:
    """sha256 of a tensor's bytes with its type and shape."""
    return hashlib.sha256(f"{dtype}{tuple(shape)}".encode() + data).hexdigest()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Outbox:
    """The tensors that a training worker offers. Holds references, not copies: the worker does
    not train while others pull."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._offers: dict[Role, tuple[int, Mapping[str, torch.Tensor]]] = {}

    def offer(
        self, role: Role, version: int, tensors: Mapping[str, torch.Tensor]
    ) -> dict[str, str]:
        """Make `tensors` available under `version`; returns name -> digest."""
        with self._lock:
            self._offers[role] = (version, dict(tensors))
        return {
            name: tensor_digest(tensor_bytes(t), dtype_name(t.dtype), t.shape)
            for name, t in tensors.items()
        }

    def withdraw(self) -> None:
        """Training goes on: nothing may be pulled any more."""
        with self._lock:
            self._offers.clear()

    def answer(self, request: FetchTensor) -> PeerReply:
        with self._lock:
            offer = self._offers.get(request.role)
            tensor = offer[1].get(request.name) if offer else None
        if offer is None or tensor is None or offer[0] != request.version:
            have = "nothing" if offer is None else f"version {offer[0]}"
            return Refused(
                reason=f"{request.role} {request.name} version {request.version}: have {have}"
            )
        return TensorBytes(
            name=request.name,
            dtype=dtype_name(tensor.dtype),
            shape=tuple(tensor.shape),
            data=tensor_bytes(tensor),
        )


class Inbox:
    """One pull of a role's weights: yields tensors as they come, and knows their digest after."""

    def __init__(self, client: PeerClient, role: Role, version: int) -> None:
        self._client = client
        self._role: Role = role
        self._version = version
        self._digests: dict[str, str] = {}

    def tensors(self, sources: Sequence[TensorSource]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one at a time: at most one tensor is in flight."""
        for source in sources:
            for name in source.names:
                reply = self._client.ask(
                    source.endpoint,
                    FetchTensor(role=self._role, name=name, version=self._version),
                )
                assert isinstance(reply, TensorBytes), reply
                self._digests[name] = tensor_digest(reply.data, reply.dtype, reply.shape)
                flat = torch.frombuffer(bytearray(reply.data), dtype=_DTYPES[reply.dtype])
                yield name, flat.reshape(reply.shape)

    def digest(self) -> str:
        """Combined digest of all that was received."""
        return combined_digest(self._digests)
