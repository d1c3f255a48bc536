"""Events of a Chrome trace of any size, read in bounded memory."""

import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

_CHUNK = 8 << 20
_LONGEST_EVENT = 64 << 20
_TRIES = 200
_GZIP = 31  # zlib's word for: gzip header and checksum
_T = TypeVar("_T")
OnProgress = Callable[[float], None]


class TraceStream:
    """One trace file: `events` streams ``traceEvents``; `head` and `tail` are the text around it.

    A file that ends early (the profiler was killed) gives what it has, and says so in `broken`.
    """

    def __init__(self, path: Path, on_progress: OnProgress | None = None) -> None:
        self.path = path
        self.head = b""
        self.tail = b""
        self.broken = ""
        self._unpack = zlib.decompressobj(_GZIP)
        self._on_progress = on_progress

    def events(self, kind: type[_T]) -> Iterator[_T]:
        """Decode every event as `kind`.

        Raises:
            ValueError: the file holds no events at all.
        """
        decoder = msgspec.json.Decoder(list[kind], strict=False)  # type: ignore[valid-type]
        buffer, inside = b"", False
        for chunk in self._chunks():
            buffer += chunk
            if not inside:
                start = buffer.find(b'"traceEvents"')
                opening = buffer.find(b"[", start) if start >= 0 else -1
                if opening < 0:
                    continue
                self.head, buffer, inside = buffer[:start], buffer[opening + 1 :], True
            found, buffer = self._complete(buffer, decoder)
            yield from found
            if len(buffer) > _LONGEST_EVENT:
                self.broken = "an event that never ends"
                return
        if not inside:
            raise ValueError(f"{self.path}: no traceEvents in it")
        yield from self._rest(buffer, decoder)

    def _complete(
        self, buffer: bytes, decoder: "msgspec.json.Decoder[list[_T]]"
    ) -> tuple[list[_T], bytes]:
        """Events that are whole, and the bytes after them."""
        end = len(buffer)
        for _ in range(_TRIES):
            # An event ends with "}"; the list goes on with a comma after it.
            end = buffer.rfind(b"},", 0, end)
            if end < 0:
                break
            try:
                return decoder.decode(b"[" + buffer[: end + 1] + b"]"), buffer[end + 2 :]
            except msgspec.DecodeError:
                continue
        return [], buffer

    def _rest(self, buffer: bytes, decoder: "msgspec.json.Decoder[list[_T]]") -> list[_T]:
        """The last events, before the bracket that closes the list."""
        if not buffer.strip():
            self.broken = self.broken or "the list of events does not end"
            return []
        end = len(buffer)
        for _ in range(_TRIES):
            end = buffer.rfind(b"]", 0, end)
            if end < 0:
                break
            try:
                found = decoder.decode(b"[" + buffer[:end] + b"]")
            except msgspec.DecodeError:
                continue
            self.tail = buffer[end + 1 :]
            return found
        self.broken = self.broken or "the list of events does not end"
        return self._complete(buffer + b",", decoder)[0]

    def _chunks(self) -> Iterator[bytes]:
        size = max(1, self.path.stat().st_size)
        with self.path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            while data := raw.read(_CHUNK >> 3 if packed else _CHUNK):
                if self._on_progress is not None:
                    self._on_progress(raw.tell() / size)
                yield from self._unpacked(data) if packed else (data,)
            if packed and not self._unpack.eof:
                self.broken = self.broken or "the gzip file is cut short"

    def _unpacked(self, data: bytes) -> Iterator[bytes]:
        """Pieces of at most `_CHUNK` bytes; what comes before damage is still given."""
        while data and not self.broken:
            try:
                yield self._unpack.decompress(data, _CHUNK)
            except zlib.error as error:
                self.broken = f"the gzip file is damaged ({error})"
                return
            data = self._unpack.unconsumed_tail
            if self._unpack.eof and self._unpack.unused_data:
                data = self._unpack.unused_data  # a gzip file may have several members
                self._unpack = zlib.decompressobj(_GZIP)
