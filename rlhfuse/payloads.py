"""Per-token data that stays with the worker that made it, until another worker asks for it.

The controller never sees these numbers: it only tells a training worker where they are. What
died with a worker is computed again by another.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rlhfuse.peer_messages import (
    Cache,
    FetchCache,
    FetchFloats,
    FetchTensor,
    Floats,
    PeerReply,
    PeerRequest,
    Refused,
)
from rlhfuse.transport import PeerClient

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
ROLLOUT = "rollout"  # the engine's own log-probabilities
REPLAYED = "replayed"  # the actor's log-probabilities among what the sampler kept
KEPT = "kept"  # int32: how many tokens it kept at each position, then which (`scoring.Kept`)


@dataclass(frozen=True, slots=True)
class Departed:
    """What an exported sample left behind."""

    cache: bytes
    logprobs: FloatArray


class PayloadStore:
    """Per-token numbers by (kind, sample id), and the remains of exported samples.

    Written by the worker, read by its peer server's thread.
    """

    def __init__(self, tensors: Callable[[FetchTensor], PeerReply] | None = None) -> None:
        self._lock = threading.Lock()
        self._floats: dict[tuple[str, int], FloatArray | IntArray] = {}
        self._departed: dict[int, Departed] = {}
        self._tensors = tensors

    def put(self, kind: str, sample_id: int, values: FloatArray | IntArray) -> None:
        with self._lock:
            self._floats[kind, sample_id] = values

    def depart(self, sample_id: int, remains: Departed) -> None:
        with self._lock:
            self._departed[sample_id] = remains

    def clear(self) -> None:
        """Forget everything: a new step begins."""
        with self._lock:
            self._floats.clear()
            self._departed.clear()

    def answer(self, request: PeerRequest) -> PeerReply:
        """The reply to another worker."""
        if isinstance(request, FetchTensor):
            if self._tensors is None:
                return Refused(reason="this worker holds no weights to send")
            return self._tensors(request)
        if isinstance(request, FetchFloats):
            return self._answer_floats(request)
        return self._answer_cache(request)

    def _answer_floats(self, request: FetchFloats) -> PeerReply:
        with self._lock:
            found = [self._floats.get((request.kind, i)) for i in request.sample_ids]
        missing = [i for i, values in zip(request.sample_ids, found, strict=True) if values is None]
        if missing:
            return Refused(reason=f"no {request.kind} values of samples {missing[:8]}")
        return Floats(values=tuple(values.tobytes() for values in found if values is not None))

    def _answer_cache(self, request: FetchCache) -> PeerReply:
        with self._lock:
            remains = self._departed.pop(request.sample_id, None)
        if remains is None:
            return Refused(reason=f"sample {request.sample_id} did not leave from here")
        return Cache(
            sample_id=request.sample_id, data=remains.cache, logprobs=remains.logprobs.tobytes()
        )


def fetch_floats(
    client: PeerClient, endpoint: str, kind: str, sample_ids: Sequence[int]
) -> list[FloatArray]:
    """Per-token floats of samples from the worker at `endpoint`, in the order asked for."""
    reply = client.ask(endpoint, FetchFloats(kind=kind, sample_ids=tuple(sample_ids)))
    assert isinstance(reply, Floats), reply
    return [np.frombuffer(data, dtype=np.float32) for data in reply.values]


def fetch_departed(client: PeerClient, endpoint: str, sample_id: int) -> Departed:
    """What a migrated sample left with the worker at `endpoint`. Can be fetched once."""
    reply = client.ask(endpoint, FetchCache(sample_id=sample_id))
    assert isinstance(reply, Cache), reply
    return Departed(reply.data, np.frombuffer(reply.logprobs, dtype=np.float32))
