"""Sleep that lasts as long as asked on average, on a machine that oversleeps."""

import ctypes
import time

_PR_SET_TIMERSLACK = 29


class EvenSleep:
    """Each sleep asks for less by what those before it overslept."""

    def __init__(self, gain: float) -> None:
        """`gain`: of what a sleep overslept, the part that all later ones make up for; 0: none.
        The timer's slack of this thread (50 us on Linux) goes."""
        ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
        self._gain = gain
        self._late_s = 0.0

    def __call__(self, seconds: float) -> None:
        start_s = time.monotonic()
        time.sleep(max(0.0, seconds - self._late_s))
        self._late_s += self._gain * (time.monotonic() - start_s - seconds)
