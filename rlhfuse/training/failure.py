"""How all ranks come to name one failure, and find the rank that hangs.

A rank that fails leaves word in the store before it leaves its channels; who waited for it, fails
then and finds the word. A rank that hangs leaves none: whoever waits for it longest finds the time
limit passed, and may wait for a rank that waits itself. So each rank has a `Lookout`: a thread that
notes in the store what its rank has been at for long. The notes lead from one who waits to the next
and to the one that does not wait.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from rlhfuse.schedules.ir import Schedule
from rlhfuse.training.links import Message, PeerLost, Step

logger = logging.getLogger(__name__)

FAILURE_KEY = "rlhfuse/first_failure"
_NOTE_KEY = "rlhfuse/long_at/"
_NOBODY = -1


class StepFailed(RuntimeError):
    """A task, here or on another rank, failed; the message says where and why."""


def publish_failure(store: Store, word: str) -> str:
    """Leave `word` as the first failure of all ranks, unless there is one; returns the first."""
    try:
        return str(store.compare_set(FAILURE_KEY, "", word).decode())
    except (RuntimeError, OSError) as error:  # the rank that hosts the store is gone
        logger.warning("no word of other ranks' failures: %s", error)
        return word


class Seat(NamedTuple):
    """A rank's place in a schedule."""

    rank: int
    row: int
    rank_of: Callable[[int], int]
    """The rank of a row that this one speaks with."""


@dataclass(frozen=True, slots=True)
class Note:
    """What a rank has been at for long: a task of its row, for which it computes or waits."""

    index: int
    awaits: int
    """The rank that it waits for; -1: it computes."""

    @classmethod
    def read(cls, store: Store, rank: int) -> "Note | None":
        """None where `rank` has not been at one thing for long, or can say nothing."""
        key = f"{_NOTE_KEY}{rank}"
        text = store.get(key).decode() if store.check([key]) else ""
        return cls(*map(int, text.split())) if text else None


class Lookout:
    """Within it, a thread notes what this rank has been at for longer than a period.

    Whoever runs the row keeps `step` and `awaits` true; the thread looks once a period, and writes
    only of what lasts.
    """

    def __init__(self, store: Store, seat: Seat, period_s: float = 1.0) -> None:
        """`period_s`: well below the time limit of a wait."""
        self.step: Step | None = None
        self.awaits: Message | None = None
        self._store = store
        self._seat = seat
        self._period_s = period_s
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lookout":
        self.step = self.awaits = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="lookout", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._thread is not None, "entered"
        self._over.set()
        self._thread.join(self._period_s)  # the store may be gone: it need not answer

    def _watch(self) -> None:
        noted, before = False, None
        try:
            while not self._over.wait(self._period_s):
                now = self.step, self.awaits
                if now == before and self.step is not None and not noted:
                    self._write(f"{self.step.index} {self._awaited(self.awaits)}")
                    noted = True
                elif now != before and noted:
                    self._write("")
                    noted = False
                before = now
            if noted:
                self._write("")
        except (RuntimeError, OSError) as error:
            logger.warning("no notes on what takes long, the store is gone: %s", error)

    def _write(self, note: str) -> None:
        self._store.set(f"{_NOTE_KEY}{self._seat.rank}", note)

    def _awaited(self, message: Message | None) -> int:
        if message is None:
            return _NOBODY
        way = message.channel
        return self._seat.rank_of(way.target if way.source == self._seat.row else way.source)


def tell_failure(
    store: Store, schedule: Schedule, seat: Seat, at: Step | None, error: Exception, why: str
) -> str:
    """What this rank is to raise: its own failure, which others are told of, or, where a peer
    failed first or hangs, its place and that. To be called before the rank leaves its channels."""
    place = "before its first task" if at is None else f"at {at.task}"
    own = f"rank {seat.rank} failed {place}: {why}"
    word = own
    if isinstance(error, PeerLost) and error.silent:
        word = _hanging(store, schedule, seat, error)
    first = publish_failure(store, word)
    around = "" if at is None else "\n" + schedule.marked(seat.row, at.index)
    if first == own:
        return own + around
    link = "" if at is None or at.receives is None else f" ({at.receives})"
    return f"rank {seat.rank} stopped {place}{link}, because {first}{around}"


def _hanging(store: Store, schedule: Schedule, seat: Seat, error: PeerLost) -> str:
    """Who hangs, where one rank found another silent."""
    found = f"found by rank {seat.rank} {error}"
    try:
        rank, note = last_of(lambda rank: Note.read(store, rank), seat.rank_of(error.peer))
    except (RuntimeError, OSError) as gone:
        return f"rank {seat.rank_of(error.peer)} is silent, {found} (and no store: {gone})"
    rows = {seat.rank_of(row): row for row in range(schedule.problem.num_ranks)}
    if note is None or rank not in rows:
        return f"rank {rank} is silent and has not said what it is at, {found}"
    return f"rank {rank} hangs at {schedule.rows[rows[rank]][note.index]}, {found}"


def last_of(note_of: Callable[[int], Note | None], first: int) -> tuple[int, Note | None]:
    """From rank `first` along those who wait for another, the one who does not (or, where they wait
    in a circle, the last one before it closes)."""
    rank, note, seen = first, note_of(first), {first}
    while note is not None and note.awaits != _NOBODY and note.awaits not in seen:
        rank = note.awaits
        seen.add(rank)
        note = note_of(rank)
    return rank, note
