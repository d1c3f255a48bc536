"""Schedules during a run: answers within milliseconds, improved between steps.

Problems change from step to step (counts, durations), often only a little. What was found for a
problem of the same shape is where the next search starts; what was found for the very same problem
is the answer. Between steps a thread may go on searching for the problems that were asked last.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from itertools import cycle
from types import TracebackType
from typing import Self

from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.searcher import Search

BUDGET_S = 0.05
MEMORY = 64  # problems and shapes that are remembered

Key = tuple[object, ...]


class OnlineScheduler:
    """`fuse` with a memory and an improver in the background.

    `budget_s` bounds the search of an answer. Threads: all methods from one thread; the improver
    has its own. Use it as a context manager, or call `stop` at the end.
    """

    def __init__(self, *, budget_s: float = BUDGET_S, split_weight: bool = False) -> None:
        self.budget_s = budget_s
        self.split_weight = split_weight
        self._known: OrderedDict[Key, Schedule] = OrderedDict()
        self._asked: OrderedDict[Key, Problem] = OrderedDict()  # the latest of each shape
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._thread: threading.Thread | None = None

    def schedule(self, problem: Problem) -> Schedule:
        """The best schedule known or found in `budget_s`; it stops an improver.

        Raises:
            ValueError: as `fuse`.
        """
        self.stop()
        known = self._recall(_exact(problem))
        if known is not None:
            self._asked[_shape(problem)] = problem
            return known
        found = fuse(
            problem,
            budget_s=self.budget_s,
            split_weight=self.split_weight,
            warm_start=self._recall(_shape(problem)),
        )
        self._remember(problem, found)
        self._asked[_shape(problem)] = problem
        return found

    def improve(self, problem: Problem, budget_s: float = 30.0) -> None:
        """Go on searching in the background, for `budget_s` at most or until `stop`."""
        self._begin([problem], budget_s)

    def improve_asked(self, budget_s: float = 30.0) -> None:
        """`improve`, for all problems asked since the last time (of each shape the latest)."""
        asked = list(self._asked.values())[-MEMORY:]
        self._asked.clear()
        self._begin(asked, budget_s)

    def stop(self) -> None:
        """End the improver; what it found is kept. Takes one round of its search."""
        if self._thread is not None:
            self._halt.set()
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """Until the improver has used its budget or reached the lower bound."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _begin(self, problems: Sequence[Problem], budget_s: float) -> None:
        self.stop()
        self._halt.clear()
        self._thread = threading.Thread(
            target=self._search, args=(problems, budget_s), name="schedule-improver", daemon=True
        )
        self._thread.start()

    def _search(self, problems: Sequence[Problem], budget_s: float) -> None:
        """Rounds for all problems in turn; those at their bound are done."""
        end = time.monotonic() + budget_s
        searches = []
        for problem in problems:
            if self._halt.is_set():
                return
            search = Search(problem, self.split_weight, seed=1)
            known = self._recall(_exact(problem)) or self._recall(_shape(problem))
            search.begin(self.split_weight, known)
            searches.append(search)
        for search in cycle(searches):
            open_ = [s for s in searches if s.best > s.bound * (1 + REL_TOL)]
            if self._halt.is_set() or time.monotonic() >= end or not open_:
                break
            if search in open_:
                search.round()
        for problem, search in zip(problems, searches, strict=True):
            self._remember(problem, search.answer())

    def _recall(self, key: Key) -> Schedule | None:
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
            return found

    def _remember(self, problem: Problem, schedule: Schedule) -> None:
        with self._lock:
            for key in (_exact(problem), _shape(problem)):
                self._known[key] = schedule
                self._known.move_to_end(key)
            while len(self._known) > 2 * MEMORY:
                self._known.popitem(last=False)


def _exact(problem: Problem) -> Key:
    links = problem.link_latency
    table = links if isinstance(links, int | float) else tuple(sorted(links.items()))
    return (problem.num_ranks, problem.pipelines, problem.memory_cap, table)


def _shape(problem: Problem) -> Key:
    """Problems of one shape have the same tasks on the same ranks."""
    return (
        problem.num_ranks,
        *((p.name, p.stages, p.num_microbatches, p.forward_only) for p in problem.pipelines),
    )
