"""Local search: swap neighbours on a critical path, by simulated annealing.

The longest path through a swapped pair follows in constant time from the paths to and from every
task (Taillard 1994, for job shops). Memory depends on the order of a row alone, so the cap is
checked in constant time too. The search stays among schedules that pass the channel check: it is
made after every few moves (fewer after a failure) and before anything counts as a result; a failure
takes the moves back. Swapping a tight critical pair cannot close a circle (van Laarhoven 1992)
except through tasks of no duration; such a swap is taken back too.
"""

import numpy as np

from rlhfuse.schedules.compiled import Coded, Floats, Ints, Rows, compiled, draw
from rlhfuse.schedules.paths import EPS, Bench, measure, safe, settle, swap


@compiled
def _may_swap(
    u: int, v: int, kind: Ints, needs: Ints, claim: Floats, change: Floats, held: float, cap: float
) -> bool:
    """Whether order and memory allow neighbours u, v to change places."""
    if kind[u] == kind[v] or needs[v] == u:
        return False
    level = held + claim[v]
    return bool(level <= cap and level + change[v] + claim[u] <= cap)


@compiled
def last_critical(rows: Rows, bench: Bench, late: Floats, longest: float, state: Ints) -> int:
    """A random last task of a critical path."""
    task, count = -1, 0.0
    for rank in range(rows.first.shape[0] - 1):
        if rows.first[rank + 1] > rows.first[rank]:
            t = rows.tasks[rows.first[rank + 1] - 1]
            if bench.end[t] >= longest - EPS:
                count += 1.0
                if draw(state) * count < 1.0:
                    task = t
    for i in range(bench.due.shape[0]):
        t = bench.due[i]
        if bench.end[t] + late[t] >= longest - EPS:
            count += 1.0
            if draw(state) * count < 1.0:
                task = t
    return int(task)


@compiled
def critical_pairs(
    rows: Rows, coded: Coded, bench: Bench, task: int, cap: float, state: Ints
) -> int:
    """Swappable pairs on a random critical path that ends in `task`; their number."""
    tasks, first, place, end = rows.tasks, rows.first, bench.place, bench.end
    held, pairs = bench.held, bench.pairs
    rank, pred, latency, duration = coded.rank, coded.pred, coded.latency, coded.duration
    kind, needs, claim, change = coded.kind, coded.needs, coded.claim, coded.change
    found = 0
    while task >= 0:
        start = end[task] - duration[task]
        position = place[task]
        before = -1
        if position > first[rank[task]] and end[tasks[position - 1]] >= start - EPS:
            before = tasks[position - 1]
            if _may_swap(before, task, kind, needs, claim, change, held[position - 1], cap):
                pairs[found] = position - 1
                found += 1
        source = pred[task]
        if source >= 0 and end[source] + latency[task] < start - EPS:
            source = -1
        by_row = before >= 0 and (source < 0 or draw(state) < 0.5)
        task = before if by_row else source
    return found


@compiled
def _arrival(task: int, pred: Ints, release: Floats, end: Floats, latency: Floats) -> float:
    source = pred[task]
    if source < 0:
        return float(release[task])
    return float(max(release[task], end[source] + latency[task]))


@compiled
def _way_out(task: int, succ: Ints, tail: Floats, latency: Floats, duration: Floats) -> float:
    target = succ[task]
    if target < 0:
        return 0.0
    return float(latency[target] + duration[target] + tail[target])


@compiled
def path_after_swap(rows: Rows, coded: Coded, bench: Bench, late: Floats, p: int) -> float:
    """Longest path through either task if the tasks at p and p + 1 changed places."""
    tasks, first, end, tail = rows.tasks, rows.first, bench.end, bench.tail
    pred, succ, latency = coded.pred, coded.succ, coded.latency
    duration, release = coded.duration, coded.release
    u, v = tasks[p], tasks[p + 1]
    rank = coded.rank[u]
    free = end[tasks[p - 1]] if p > first[rank] else 0.0
    end_v = max(free, _arrival(v, pred, release, end, latency)) + duration[v]
    end_u = max(end_v, _arrival(u, pred, release, end, latency)) + duration[u]
    tail_u = max(late[u], _way_out(u, succ, tail, latency, duration))
    if p + 2 < first[rank + 1]:
        tail_u = max(tail_u, duration[tasks[p + 2]] + tail[tasks[p + 2]])
    through_v = end_v + max(late[v], _way_out(v, succ, tail, latency, duration))
    return float(max(end_u + tail_u, through_v))


@compiled
def _pick(
    rows: Rows,
    coded: Coded,
    bench: Bench,
    late: Floats,
    found: int,
    threshold: float,
    temperature: float,
    state: Ints,
) -> int:
    """Position of an accepted pair among the first `found`, or -1. Rejected pairs are dropped."""
    pairs = bench.pairs
    while found > 0:
        i = int(draw(state) * found)
        p = pairs[i]
        allowed = threshold - temperature * np.log(draw(state) + 1e-12)
        if path_after_swap(rows, coded, bench, late, p) <= allowed + EPS:
            return int(p)
        found -= 1
        pairs[i] = pairs[found]
    return -1


@compiled
def anneal(
    rows: Rows,
    coded: Coded,
    bench: Bench,
    late: Floats,
    cap: float,
    target: float,
    best: float,
    hot: float,
    cold: float,
    moves: int,
    state: Ints,
) -> float:
    """Try `moves` moves from `rows`, changing them; the best makespan, its tasks in `bench.best`.

    `best` is the makespan to beat; `target` is where to stop; the temperature falls from `hot`
    to `cold` in problem units.
    """
    settle(rows, coded, bench)
    longest = measure(rows, coded, bench, late)
    bench.known[:] = rows.tasks
    cooling = (cold / hot) ** (1.0 / max(1, moves))
    temperature = hot
    since, patience = 0, 1
    for _ in range(moves):
        if best <= target + EPS:
            return best
        temperature *= cooling
        task = last_critical(rows, bench, late, longest, state)
        found = critical_pairs(rows, coded, bench, task, cap, state)
        p = _pick(rows, coded, bench, late, found, longest, temperature, state)
        if p < 0:
            continue
        longest = swap(rows, coded, bench, late, p)
        since += 1
        if longest >= 0.0 and since < patience and longest >= best - EPS:
            continue
        since = 0
        if longest < 0.0 or not safe(rows, coded, bench, 1):
            patience = max(1, patience // 2)
            rows.tasks[:] = bench.known
            settle(rows, coded, bench)
            longest = measure(rows, coded, bench, late)
            continue
        patience = min(2 * patience, 32)
        bench.known[:] = rows.tasks
        if longest < best - EPS:
            best = longest
            bench.best[:] = rows.tasks
    if not safe(rows, coded, bench, 1):
        rows.tasks[:] = bench.known
    return best
