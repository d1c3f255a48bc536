"""Clocks for spans: the machine's monotonic clock, or events of a CUDA stream."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from rlhfuse.timeline import ArgValue, Kind, Span

Mark = float | torch.cuda.Event
"""A moment, to be read as seconds later, when the device has passed it."""


class Clock(Protocol):
    """Marks moments without holding up the device; reads them afterwards.

    Seconds are those of ``time.monotonic``, which processes of one machine share.
    """

    def start(self) -> None:
        """Called before the first mark of a run."""

    def mark(self) -> Mark:
        """Now, in the order of the device's work."""

    def seconds(self, mark: Mark) -> float:
        """When `mark` was passed. Waits for the device if need be."""


class HostClock:
    """For devices that compute before they return: the CPU."""

    def start(self) -> None:
        pass

    mark = staticmethod(time.monotonic)

    def seconds(self, mark: Mark) -> float:
        assert isinstance(mark, float)
        return mark


class CudaClock:
    """For the current CUDA stream: waits of the stream count, not those of the host."""

    def __init__(self) -> None:
        self._zero = _timing_event()
        self._zero_s = 0.0

    def start(self) -> None:
        torch.cuda.current_stream().synchronize()
        self._zero.record()
        self._zero_s = time.monotonic()

    def mark(self) -> Mark:
        event = _timing_event()
        event.record()
        return event

    def seconds(self, mark: Mark) -> float:
        assert isinstance(mark, torch.cuda.Event)
        mark.synchronize()
        return self._zero_s + float(self._zero.elapsed_time(mark)) / 1e3


def _timing_event() -> torch.cuda.Event:
    event: torch.cuda.Event = torch.cuda.Event(enable_timing=True)
    return event


def clock_of(device: torch.device) -> Clock:
    """The clock that tells when work on `device` is done."""
    return CudaClock() if device.type == "cuda" else HostClock()


class Watch:
    """Spans of what one rank does beside the tasks of schedules."""

    def __init__(self, rank: int, device: torch.device) -> None:
        self._lane = f"rank{rank}"
        self._device = device

    @contextmanager
    def measure(self, spans: list[Span], kind: Kind, name: str) -> Iterator[None]:
        """Append the span of what is done inside, until the device has done it, too."""
        start_s = time.monotonic()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        args: dict[str, ArgValue] = {"what": "barrier"} if kind is Kind.WAIT else {}
        spans.append(Span(self._lane, start_s, time.monotonic(), kind, name, args))
