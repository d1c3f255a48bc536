"""Local search that always goes on: the best swap on a critical path that is not tabu.

Of the pairs on a critical path the one with the shortest path through it after the swap changes
places, even where that is longer than before; going back is tabu for a while (Taillard 1994,
Nowicki and Smutnicki 1996, for job shops). It descends much faster than annealing and gets stuck
earlier, so it starts anew from fresh list schedules, again and again.
"""

import numpy as np

from rlhfuse.schedules.compiled import Coded, Floats, Ints, Rows, compiled, draw
from rlhfuse.schedules.local import critical_pairs, last_critical, path_after_swap
from rlhfuse.schedules.paths import EPS, Bench, measure, safe, settle, swap

TENURE = (8.0, 20.0)  # moves for which a pair may not change back
SLOTS = 4096  # of the table of tabu orders, by hash


def make_tabu() -> Ints:
    """The table of tabu orders: the move until which one may not come back."""
    return np.zeros(SLOTS, np.int64)


@compiled
def _slot(before: int, after: int) -> int:
    """Where the table keeps an order of two tasks."""
    return (before * 1000003 + after) % SLOTS


@compiled
def _choose(
    rows: Rows,
    coded: Coded,
    bench: Bench,
    late: Floats,
    found: int,
    best: float,
    noise: float,
    until: Ints,
    move: int,
    state: Ints,
) -> int:
    """Position of the best pair among the first `found` that is not tabu; a random one if all are.

    A tabu pair counts if it may lead below `best`. `noise` breaks ties.
    """
    pick, least = -1, np.inf
    for i in range(found):
        p = bench.pairs[i]
        path = path_after_swap(rows, coded, bench, late, p)
        tabu = until[_slot(rows.tasks[p + 1], rows.tasks[p])] > move
        path -= noise * np.log(draw(state) + 1e-12)
        if path < least and not (tabu and path >= best - EPS):
            pick, least = p, path
    if pick < 0 and found > 0:
        pick = bench.pairs[int(draw(state) * found)]
    return int(pick)


@compiled
def descend(
    rows: Rows,
    coded: Coded,
    bench: Bench,
    late: Floats,
    cap: float,
    target: float,
    best: float,
    noise: float,
    moves: int,
    until: Ints,
    state: Ints,
) -> float:
    """Make `moves` moves from `rows`, changing them; the best makespan, its tasks in `bench.best`.

    `best` is the makespan to beat; `target` is where to stop; `noise` is in problem units.
    """
    settle(rows, coded, bench)
    longest = measure(rows, coded, bench, late)
    bench.known[:] = rows.tasks
    until[:] = 0
    since, patience = 0, 1
    for move in range(1, moves + 1):
        if best <= target + EPS:
            return best
        task = last_critical(rows, bench, late, longest, state)
        found = critical_pairs(rows, coded, bench, task, cap, state)
        p = _choose(rows, coded, bench, late, found, best, noise, until, move, state)
        if p < 0:
            continue  # nothing on this path may move
        u, v = rows.tasks[p], rows.tasks[p + 1]
        tenure = int(TENURE[0] + (TENURE[1] - TENURE[0]) * draw(state))
        until[_slot(u, v)] = move + tenure
        longest = swap(rows, coded, bench, late, p)
        since += 1
        if longest >= 0.0 and since < patience and longest >= best - EPS:
            continue
        if longest < 0.0 or not safe(rows, coded, bench, 1):
            if since == 1:
                until[_slot(v, u)] = move + 4 * tenure  # this very move was the mistake
            since, patience = 0, max(1, patience // 2)
            rows.tasks[:] = bench.known
            settle(rows, coded, bench)
            longest = measure(rows, coded, bench, late)
            continue
        since, patience = 0, min(2 * patience, 32)
        bench.known[:] = rows.tasks
        if longest < best - EPS:
            best = longest
            bench.best[:] = rows.tasks
    if not safe(rows, coded, bench, 1):
        rows.tasks[:] = bench.known
    return best
