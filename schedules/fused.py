"""The front door: the best schedule found for several pipelines on the same ranks."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace

from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.searcher import Search

DEFAULT_ROUNDS = 200


@dataclass(frozen=True, slots=True)
class Progress:
    """What a search tells while it runs."""

    makespan: float
    lower_bound: float
    round: int
    seconds: float


def fuse(
    problem: Problem,
    *,
    memory_cap: float | None = None,
    budget_s: float | None = None,
    iterations: int | None = None,
    seed: int = 0,
    split_weight: bool = False,
    warm_start: Schedule | None = None,
    workers: int = 1,
    target: float = 0.0,
    on_progress: Callable[[Progress], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Schedule:
    """The best schedule found: valid, executable, and never slower than `serial`.

    The search runs for `iterations` rounds or `budget_s` seconds, whichever ends first (with
    neither, 200 rounds), and stops early at the lower bound or at `target`. Rounds are
    deterministic in `seed` and `workers`, a time budget is not. `memory_cap` overrides the
    problem's. `split_weight` may use I and W. `workers` searches run side by side, one core each,
    from different seeds. `warm_start` gives rows to start from, where they fit the problem. Ctrl-C
    returns the best so far. `clock` is what the budget counts: ``time.process_time`` on a machine
    with other work.

    Raises:
        ValueError: the cap holds no schedule (the least that does is named), or deadlines are not
            met by anything found.
    """
    if memory_cap is not None:
        problem = replace(problem, memory_cap=memory_cap)
    if workers < 1:
        raise ValueError(f"workers is {workers}, expected at least 1")
    if iterations is None and budget_s is None:
        iterations = DEFAULT_ROUNDS
    start = clock()
    searches = [Search(problem, split_weight, seed + 1_000_003 * i) for i in range(workers)]
    for search in searches:
        search.begin(split_weight, warm_start)
    told, number = min(search.best for search in searches), 0
    enough = max(target, searches[0].bound) * (1 + REL_TOL)
    with ExitStack() as stack:
        advance = _advance(searches, stack)
        try:
            while told > enough:
                spent = clock() - start
                if iterations is not None and number >= iterations:
                    break
                if budget_s is not None and spent >= budget_s:
                    break
                advance()
                number += 1
                best = min(search.best for search in searches)
                if best < told and on_progress is not None:
                    spent = clock() - start
                    on_progress(Progress(best, searches[0].bound, number, spent))
                told = best
        except KeyboardInterrupt:
            pass  # the user has seen enough: the best so far is the answer
    return min(searches, key=lambda search: search.best).answer()


def _advance(searches: Sequence[Search], stack: ExitStack) -> Callable[[], None]:
    """One round of every search, side by side if there are several."""
    if len(searches) == 1:
        return searches[0].round
    pool = stack.enter_context(ThreadPoolExecutor(len(searches)))

    def together() -> None:
        for future in [pool.submit(search.round) for search in searches]:
            future.result()

    return together
