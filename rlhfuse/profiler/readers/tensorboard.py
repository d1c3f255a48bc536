"""TensorBoard event files: the scalars of every step, which hold the stage times of a run.

The format is a sequence of records (length, checksum, data, checksum), each a protocol buffer
``Event`` of which step and scalar summaries are read. (tensorboard/compat/proto: event.proto,
summary.proto, tensor.proto; TFRecord.)
"""

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

from rlhfuse.profiler.readers.step_metrics import trace_of_rows
from rlhfuse.profiler.trace import Trace

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_LONGEST = 1 << 28
_MARK = b"brain.Event:"
Value = int | bytes


def is_event_file(head: bytes) -> bool:
    """Whether a file begins as TensorBoard's do: with a record that names the format's version."""
    return _MARK in head[:64] and len(head) > 24


def open_tensorboard(paths: list[Path]) -> Trace:
    """The steps of one run; what later files say of a step replaces what earlier ones say.

    Raises:
        ValueError: no step has the time of a stage.
    """
    rows: dict[int, dict[str, float]] = {}
    for path in sorted(paths, key=lambda path: path.name):
        for record in _records(path.read_bytes()):
            step, scalars = _event(record)
            if scalars:
                rows.setdefault(step, {}).update(scalars)
    return trace_of_rows("tensorboard", rows, str(paths[0]))


def _records(data: bytes) -> Iterator[bytes]:
    """Whole records; a file that ends within one (the run was killed) gives those before."""
    at = 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        if length > _LONGEST or at + 16 + length > len(data):
            return
        yield data[at + 12 : at + 12 + length]
        at += 16 + length


def _event(record: bytes) -> tuple[int, dict[str, float]]:
    step, scalars = 0, dict[str, float]()
    for field, value in _fields(record):
        if field == 2 and isinstance(value, int):
            step = value
        elif field == 5 and isinstance(value, bytes):
            for inner, summary in _fields(value):
                if inner == 1 and isinstance(summary, bytes):
                    scalars.update(_scalar(summary))
    return step, scalars


def _scalar(summary: bytes) -> Mapping[str, float]:
    tag, number = "", None
    for field, value in _fields(summary):
        if field == 1 and isinstance(value, bytes):
            tag = value.decode(errors="replace")
        elif field == 2 and isinstance(value, bytes) and len(value) == 4:
            (number,) = struct.unpack("<f", value)
        elif field == 8 and isinstance(value, bytes):
            number = _tensor(value)
    return {tag: float(number)} if tag and number is not None else {}


def _tensor(data: bytes) -> float | None:
    """A tensor of one float32 or float64."""
    kind = 0
    for field, value in _fields(data):
        if field == 1 and isinstance(value, int):
            kind = value
        elif field in (4, 5, 6) and isinstance(value, bytes):
            form = {4: "<f", 8: "<d"}.get(len(value))
            if form is not None and kind in (1, 2):
                return float(struct.unpack(form, value)[0])
    return None


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    """(number, value) of a message's fields; what cannot be read ends it."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        if wire == _VARINT:
            number, at = _varint(data, at)
            yield key >> 3, number
            continue
        if wire == _BYTES:
            length, at = _varint(data, at)
        else:
            length = {_FIXED64: 8, _FIXED32: 4}.get(wire, len(data))
        if at + length > len(data):
            return
        yield key >> 3, data[at : at + length]
        at += length


def _varint(data: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(data) and shift < 64:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return number, at
    return number, len(data)
