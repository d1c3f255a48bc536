"""Unions of half-open intervals of time. Pure."""

from dataclasses import dataclass

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats


@dataclass(frozen=True, slots=True)
class Union:
    """A union of intervals: `starts` and `ends` of its parts, which do not touch."""

    starts: Floats
    ends: Floats

    @staticmethod
    def of(starts: Floats, ends: Floats) -> "Union":
        """Intervals in any order; empty ones are left out."""
        full = ends > starts
        order = np.argsort(starts[full], kind="stable")
        starts, ends = starts[full][order], ends[full][order]
        if not len(starts):
            return Union(starts, ends)
        reach = np.maximum.accumulate(ends)
        first = np.concatenate([[True], starts[1:] > reach[:-1]])
        last = np.concatenate([first[1:], [True]])
        return Union(starts[first], reach[last])

    def covers(self, times: Floats) -> Bools:
        """Which of these moments lie inside."""
        if not len(self.starts):
            return np.zeros(len(times), dtype=np.bool_)
        index = np.searchsorted(self.starts, times, side="right") - 1
        return (index >= 0) & (times < self.ends[np.maximum(index, 0)])

    @property
    def edges(self) -> Floats:
        return np.concatenate([self.starts, self.ends])
