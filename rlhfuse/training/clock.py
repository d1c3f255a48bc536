"""Clocks for spans: the machine's monotonic clock, or events of a CUDA stream."""

import time
from typing import Protocol

import torch

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

    def mark(self) -> Mark:
        return time.monotonic()

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
