"""Sending and receiving weights, in bounded pieces, with proof of arrival."""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from rlhfuse.messages import Role, TensorSource
from rlhfuse.peer_messages import FetchTensor, PeerReply, Refused, TensorBytes
from rlhfuse.transport import PeerClient
from rlhfuse.weights.plan import combined_digest

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


BUCKET_BYTES = 1 << 25
"""Most that is on its way, or copied, at a time, however large a tensor is."""


def byte_range(tensor: torch.Tensor, first: int, length: int) -> npt.NDArray[np.uint8]:
    """Some of the raw bytes of a tensor, row-major; no copy where it is contiguous on a CPU."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    part: npt.NDArray[np.uint8] = flat[first : first + length].to("cpu").numpy()
    return part


def tensor_digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's type, shape and bytes."""
    whole = _begun(dtype_name(tensor.dtype), tensor.shape)
    for first in range(0, tensor.nbytes, BUCKET_BYTES):
        whole.update(byte_range(tensor, first, BUCKET_BYTES).data)
    return whole.hexdigest()


def _begun(dtype: str, shape: Sequence[int]) -> "hashlib._Hash":
    return hashlib.sha256(f"{dtype}{tuple(shape)}".encode())


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
        return {name: tensor_digest(tensor) for name, tensor in tensors.items()}

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
            data=byte_range(tensor, request.first, request.length).tobytes(),
        )


class Inbox:
    """One pull of a role's weights: yields tensors as they come, and knows their digest after."""

    def __init__(self, client: PeerClient, role: Role, version: int) -> None:
        self._client = client
        self._role: Role = role
        self._version = version
        self._digests: dict[str, str] = {}

    def tensors(self, sources: Sequence[TensorSource]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) one at a time: at most one tensor is in memory, one bucket on its way."""
        for source in sources:
            for name in source.names:
                yield name, self._tensor(source.endpoint, name)

    def _tensor(self, endpoint: str, name: str) -> torch.Tensor:
        part = self._ask(endpoint, name, 0)
        tensor = torch.empty(part.shape, dtype=_DTYPES[part.dtype])
        into = tensor.reshape(-1).view(torch.uint8).numpy()
        whole = _begun(part.dtype, part.shape)
        first = 0
        while True:
            whole.update(part.data)
            into[first : first + len(part.data)] = np.frombuffer(part.data, dtype=np.uint8)
            first += len(part.data)
            if first >= tensor.nbytes:
                break
            part = self._ask(endpoint, name, first)
        self._digests[name] = whole.hexdigest()
        return tensor

    def _ask(self, endpoint: str, name: str, first: int) -> TensorBytes:
        reply = self._client.ask(
            endpoint,
            FetchTensor(
                role=self._role,
                name=name,
                version=self._version,
                first=first,
                length=BUCKET_BYTES,
            ),
        )
        assert isinstance(reply, TensorBytes), reply
        assert len(reply.data) > 0, f"{name}: nothing came of byte {first} and up"
        return reply

    def digest(self) -> str:
        """Combined digest of all that was received."""
        return combined_digest(self._digests)
