"""What a message is on the wire: the run's token, the protocol's version, then msgpack.

Whatever else arrives (from another run, another version, a stranger, noise) is `NotAMessage`.
"""

import secrets
from typing import Any, Generic, TypeVar

import msgspec

from rlhfuse.messages import PROTOCOL_VERSION
from rlhfuse.placement import RunKeys

MAX_CONTROL_BYTES = 1 << 28  # commands, events, requests
MAX_PAYLOAD_BYTES = 1 << 32  # weights, caches: what msgpack can hold
MessageT = TypeVar("MessageT")


class NotAMessage(ValueError):
    """Bytes that are no message of this run, with the reason."""


class Codec(Generic[MessageT]):
    """Messages of one kind to frames and back."""

    def __init__(self, kind: Any, keys: RunKeys, most_bytes: int = MAX_CONTROL_BYTES) -> None:
        """`kind`: a union of message types; `most_bytes`: of a frame."""
        self._most_bytes = most_bytes
        self._head = keys.token + bytes([PROTOCOL_VERSION])
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[MessageT] = msgspec.msgpack.Decoder(kind)

    def encode(self, message: object) -> bytes:
        """Raises ValueError for a message that no receiver would take."""
        frame = self._head + self._encoder.encode(message)
        if len(frame) > self._most_bytes:
            raise ValueError(
                f"{type(message).__name__} of {len(frame)} bytes is over the limit of "
                f"{self._most_bytes}"
            )
        return frame

    def decode(self, frame: bytes) -> MessageT:
        """Raises NotAMessage, whatever the bytes are."""
        if len(frame) > self._most_bytes:
            raise NotAMessage(f"{len(frame)} bytes are over the limit of {self._most_bytes}")
        size = len(self._head)
        token, version = frame[: size - 1], frame[size - 1 : size]
        if not secrets.compare_digest(token, self._head[:-1]):
            raise NotAMessage("it is not of this run")
        if version != self._head[-1:]:
            raise NotAMessage(f"protocol {version.hex() or 'missing'}, here {PROTOCOL_VERSION}")
        try:
            return self._decoder.decode(memoryview(frame)[size:])
        except (msgspec.MsgspecError, ValueError, AssertionError, RecursionError) as error:
            # Types may check themselves with an assertion, which msgspec lets through.
            raise NotAMessage(f"{type(error).__name__}: {error}") from error
