"""Between workers: requests for data that stays with its maker, and their replies.

The controller only says where the data is (endpoints in `rlhfuse.messages`); per-token numbers,
weights and caches go from worker to worker.
"""

from typing import Annotated

import msgspec

from rlhfuse.messages import Message, Role, SampleIds, whole_numbers

Floats32 = Annotated[bytes, msgspec.Meta(max_length=64 * 1024 * 1024)]


class FetchFloats(Message, frozen=True):
    """Per-token numbers of samples: kind is a role, ``rollout`` for the engine's own, or one of
    `payloads`."""

    kind: str
    sample_ids: SampleIds


class Floats(Message, frozen=True):
    """float32 (of kept tokens int32) bytes, one entry per sample asked for."""

    values: tuple[Floats32, ...]

    def __post_init__(self) -> None:
        for value in self.values:
            whole_numbers(value, "values")


class FetchTensor(Message, frozen=True):
    """`length` bytes, from byte `first` on, of a frozen tensor (`PrepareWeights`)."""

    role: Role
    name: str
    version: int
    first: int
    length: int


class TensorBytes(Message, frozen=True):
    """Part of a tensor of this type and shape: up to as many bytes as were asked for."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes


class FetchCache(Message, frozen=True):
    sample_id: int


class Cache(Message, frozen=True):
    """What an exported sample left behind. `data` may be empty: then prefill again."""

    sample_id: int
    data: bytes
    logprobs: Floats32  # one per response token so far

    def __post_init__(self) -> None:
        whole_numbers(self.logprobs, "logprobs")


class Refused(Message, frozen=True):
    """The asked-for data is not here."""

    reason: str


PeerRequest = FetchFloats | FetchTensor | FetchCache
PeerReply = Floats | TensorBytes | Cache | Refused
