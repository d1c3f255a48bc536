"""Which sends and receives one kernel carries, from the calls before its launch.

PyTorch's ``batch_isend_irecv`` records every send and receive on the host (with peers) and then
launches one kernel for all of them, which says nothing (pytorch #194693). On the launching thread
the calls between the launch before and this one are its own: calls on a thread are in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhfuse.profiler.arrays import Floats, Ints


@dataclass(frozen=True, slots=True)
class Record:
    """A communication call, or what a kernel says of the call behind it.

    `peer`: of a send or receive. `group`: of ranks; `purpose`: what the group is for, in words.
    """

    start_s: float
    thread: int
    what: str
    peer: int | None
    group: str
    sequence: int | None
    purpose: str


@dataclass(frozen=True, slots=True)
class Launches:
    """Runtime calls that put work on the device, as columns."""

    correlation: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    start_s: Floats = field(default_factory=lambda: np.empty(0))
    thread: Ints = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def of(self, correlation: Ints) -> tuple[Floats, Ints]:
        """When and on which thread each was launched; NaN and -1 where that is not known."""
        if not len(self.correlation):
            return np.full(len(correlation), np.nan), np.full(len(correlation), -1)
        order = np.argsort(self.correlation, kind="stable")
        known = self.correlation[order]
        place = np.minimum(np.searchsorted(known, correlation), len(known) - 1)
        hit = known[place] == correlation
        row = order[place]
        return np.where(hit, self.start_s[row], np.nan), np.where(hit, self.thread[row], -1)


class Batches:
    """Peers by launch, for the communication kernels of one rank."""

    def __init__(
        self, calls: Sequence[Record], launches: Launches, correlations: Sequence[int]
    ) -> None:
        self._peers: dict[int, tuple[tuple[int, bool], ...]] = {}
        moments, threads = launches.of(np.array(correlations, dtype=np.int64))
        launched = sorted(
            (thread, moment, correlation)
            for thread, moment, correlation in zip(
                threads.tolist(), moments.tolist(), correlations, strict=True
            )
            if thread >= 0
        )
        mine = sorted(
            (c.thread, c.start_s, c.peer, c.what == "send")
            for c in calls
            if c.what in ("send", "recv") and c.peer is not None
        )
        at = 0
        for thread, moment, correlation in launched:
            while at < len(mine) and mine[at][0] < thread:
                at += 1
            members = []
            while at < len(mine) and mine[at][0] == thread and mine[at][1] <= moment:
                members.append((mine[at][2], mine[at][3]))
                at += 1
            self._peers[correlation] = tuple(members)

    def peers(self, correlation: int) -> tuple[tuple[int, bool], ...]:
        """The ranks that this kernel sends to (True) and receives from; empty where not known."""
        return self._peers.get(correlation, ())
