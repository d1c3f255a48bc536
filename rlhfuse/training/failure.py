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


class Position(NamedTuple):
    """Which row of a schedule a rank runs."""

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

    def __init__(self, store: Store, position: Position, period_s: float = 1.0) -> None:
        """`period_s`: well below the time limit of a wait."""
        self.step: Step | None = None
        self.awaits: Message | None = None
        self._store = store
        self._position = position
        self._period_s = period_s
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lookout":
        self.step = self.awaits = None
        self._over = threading.Event()
        self._thread = threading.Thread(
            target=self._watch, args=(self._over,), name="lookout", daemon=True
        )
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

    def _watch(self, over: threading.Event) -> None:
        """Until `over`, which is this thread's own: one that the store held up may still be there
        when the next one begins."""
        noted, before = False, None
        try:
            while not over.wait(self._period_s):
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
        self._store.set(f"{_NOTE_KEY}{self._position.rank}", note)

    def _awaited(self, message: Message | None) -> int:
        if message is None:
            return _NOBODY
        way = message.channel
        return self._position.rank_of(
            way.target if way.source == self._position.row else way.source
        )


def in_one_voice(
    store: Store, rank: int, place: str, why: str, *, blame: str = "", link: str = ""
) -> str:
    """What a rank that stopped at `place` is to raise: its own failure, which others are told of
    here, or, where another was first, that. To be called before it leaves those who wait for it.

    `blame`: told instead of its own, where another rank is known to be the cause. `link`: what it
    waited for.
    """
    own = f"rank {rank} failed {place}: {why}"
    first = publish_failure(store, blame or own)
    return own if first == own else f"rank {rank} stopped {place}{link}, because {first}"


def tell_failure(
    store: Store,
    schedule: Schedule,
    position: Position,
    at: Step | None,
    error: Exception,
    why: str,
) -> str:
    """`in_one_voice`, of a rank that runs a schedule: with the schedule around its task `at`, and
    blaming the rank that hangs where it waited in vain."""
    blame = ""
    if isinstance(error, PeerLost) and error.silent:
        blame = _hanging(store, schedule, position, error)
    if at is None:
        return in_one_voice(store, position.rank, "before or after its tasks", why, blame=blame)
    link = "" if at.receives is None else f" ({at.receives})"
    text = in_one_voice(store, position.rank, f"at {at.task}", why, blame=blame, link=link)
    return f"{text}\n{schedule.marked(position.row, at.index)}"


def _hanging(store: Store, schedule: Schedule, position: Position, error: PeerLost) -> str:
    """Who hangs, where one rank found another silent."""
    found = f"found by rank {position.rank} {error}"
    try:
        rank, note = last_of(lambda rank: Note.read(store, rank), position.rank_of(error.peer))
    except (RuntimeError, OSError) as gone:
        return f"rank {position.rank_of(error.peer)} is silent, {found} (and no store: {gone})"
    rows = {position.rank_of(row): row for row in range(schedule.problem.num_ranks)}
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
