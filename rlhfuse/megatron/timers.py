"""Megatron's timers for the time of one run, without waiting for the device at every task.

Megatron's level-2 timers (``forward-compute``, ``backward-compute``) wait for the device twice per
task: what they measure is then no longer the pipeline that runs without them. Here such a timer
marks its start and stop in the device's own order (CUDA events), and the user's timer is given the
sums when the run is over. Timers of level 1, once per call, are the user's own; two models that
share them count as one.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.timers import DummyTimer

from rlhfuse.training.clock import Clock, Mark, clock_of


@dataclass(slots=True)
class MarkedTimer:
    """In place of one of Megatron's timers: marks now, seconds later."""

    theirs: Any
    clock: Clock
    _marks: list[tuple[Mark, Mark]] = field(default_factory=list)
    _started: Mark | None = None

    def start(self, barrier: bool = False) -> None:
        """`barrier`: of the user's timer; none is needed for a mark."""
        assert self._started is None, "timer has already been started"
        self._started = self.clock.mark()

    def stop(self, barrier: bool = False) -> None:
        assert self._started is not None, "timer is not started"
        self._marks.append((self._started, self.clock.mark()))
        self._started = None

    def hand_over(self) -> None:
        """Add what was measured to the user's timer. Waits for the device."""
        at = self.clock.seconds
        seconds = sum(at(stop) - at(start) for start, stop in self._marks)
        self.theirs._elapsed += seconds
        self.theirs._active_time += seconds
        self._marks.clear()


@dataclass(slots=True)
class SharedTimer:
    """A timer of the user's that runs from the first model's start to the last one's stop."""

    theirs: Any
    _running: int = 0

    def start(self, barrier: bool = False) -> None:
        self._running += 1
        if self._running == 1:
            self.theirs.start(barrier=barrier)

    def stop(self, barrier: bool = False) -> None:
        self._running -= 1
        if self._running == 0:
            self.theirs.stop(barrier=barrier)

    def abandon(self) -> None:
        """After a failure: the user's timer can be started again."""
        if self._running:
            self.theirs.reset()


class QuietTimers:
    """Called as Megatron's ``Timers``: ``timers(name, log_level=...)``."""

    def __init__(self, theirs: Any, device: torch.device) -> None:
        self._theirs = theirs
        self._device = device
        self._clock: Clock | None = None
        self._used: dict[str, MarkedTimer | SharedTimer | DummyTimer] = {}

    def __call__(self, name: str, log_level: int | None = None) -> Any:
        """As Megatron's; a timer's first call tells its level (2 if it does not)."""
        if name not in self._used:
            theirs = self._theirs(name, log_level=log_level)
            if isinstance(theirs, DummyTimer):
                self._used[name] = theirs
            elif log_level == 1:
                self._used[name] = SharedTimer(theirs)
            else:
                self._used[name] = MarkedTimer(theirs, self._started_clock())
        return self._used[name]

    def hand_over(self) -> None:
        """Give the user's timers what was measured. Waits for the device."""
        for timer in self._used.values():
            if isinstance(timer, MarkedTimer):
                timer.hand_over()

    def _started_clock(self) -> Clock:
        if self._clock is None:
            self._clock = clock_of(self._device)
            self._clock.start()
        return self._clock

    def abandon(self) -> None:
        """After a failure."""
        for timer in self._used.values():
            if isinstance(timer, SharedTimer):
                timer.abandon()


@contextmanager
def quiet_timers(configs: Iterable[Any], device: torch.device) -> Iterator[None]:
    """Within, the configs' timers do not hold up the device at every task."""
    quiet: dict[int, QuietTimers] = {}
    with ExitStack() as stack:
        for config in configs:
            theirs = config.timers
            if theirs is None:
                continue
            if id(theirs) not in quiet:
                quiet[id(theirs)] = QuietTimers(theirs, device)
            stack.callback(setattr, config, "timers", theirs)
            config.timers = quiet[id(theirs)]
        try:
            yield
        except BaseException:
            for timers in quiet.values():
                timers.abandon()
            raise
        for timers in quiet.values():
            timers.hand_over()
