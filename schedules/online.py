"""Schedules during a run: answers within milliseconds, improved between steps.

Problems change from step to step (counts, durations), often only a little. What was found for a
problem of the same shape is where the next search starts; what was found for the very same problem
is the answer. Between steps a thread may go on searching for the problem that was asked last.
"""

import threading
from collections import OrderedDict
from types import TracebackType
from typing import Self

from rlhfuse.schedules.bounds import latency_bound
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.timing import makespan

BUDGET_S = 0.05
PIECE_S = 0.25  # the improver looks up this often
MEMORY = 64  # problems and shapes that are remembered

Key = tuple[object, ...]


class OnlineScheduler:
    """`fuse` with a memory and an improver in the background.

    `budget_s` bounds the search of an answer. Threads: `schedule`, `improve` and `stop` from one
    thread; the improver is its own. Use it as a context manager, or call `stop` at the end.
    """

    def __init__(self, *, budget_s: float = BUDGET_S, split_weight: bool = False) -> None:
        self.budget_s = budget_s
        self.split_weight = split_weight
        self._known: OrderedDict[Key, Schedule] = OrderedDict()
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
            return known
        found = fuse(
            problem,
            budget_s=self.budget_s,
            split_weight=self.split_weight,
            warm_start=self._recall(_shape(problem)),
        )
        self._remember(problem, found)
        return found

    def improve(self, problem: Problem, budget_s: float = 30.0) -> None:
        """Go on searching in the background, for `budget_s` at most or until `stop`."""
        self.stop()
        self._halt.clear()
        self._thread = threading.Thread(
            target=self._search, args=(problem, budget_s), name="schedule-improver", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """End the improver; what it found is kept. Takes up to a quarter of a second."""
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

    def _search(self, problem: Problem, budget_s: float) -> None:
        bound = latency_bound(problem, split_weight=self.split_weight)
        best = self._recall(_exact(problem)) or self._recall(_shape(problem))
        pieces = max(1, round(budget_s / PIECE_S))
        for piece in range(pieces):
            if self._halt.is_set():
                return
            found = fuse(
                problem,
                budget_s=min(PIECE_S, budget_s),
                seed=piece + 1,
                split_weight=self.split_weight,
                warm_start=best,
            )
            best = found
            self._remember(problem, found)
            if makespan(found) <= bound * (1 + REL_TOL):
                return

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
