"""Local search: swap neighbours on a critical path, by simulated annealing.

With the longest path to (`end`) and from (`tail`) every task at hand, the longest path through a
swapped pair follows in constant time (Taillard 1994, for job shops), so only accepted moves cost a
pass over the tasks. Memory depends on the order of a row alone, so the cap is checked in constant
time too. Swapping a tight critical pair cannot close a circle (van Laarhoven 1992) except through
tasks of no duration; such a swap is taken back.
"""

from typing import NamedTuple

import numpy as np

from rlhfuse.schedules.compiled import (
    SLOT_B,
    SLOT_W,
    Bools,
    Coded,
    Floats,
    Ints,
    Rows,
    compiled,
    run_rows,
)
from rlhfuse.schedules.timing import run_channels

EPS = 1e-9


class Bench(NamedTuple):
    """Working arrays of one search over schedules with N tasks; made once."""

    place: Ints  # [T] position of each task in the rows
    end: Floats  # [T]
    tail: Floats  # [T] longest path from the end of the task to the end of all
    order: Ints  # [N]
    held: Floats  # [N] memory before the task at this position
    waiter: Ints  # [T]
    at: Ints  # [num_ranks]
    todo: Ints  # [num_ranks + 1]
    pairs: Ints  # [N] positions p whose tasks p, p + 1 may be swapped
    best: Ints  # [N] tasks of the best rows so far
    channel: Ints  # [T]
    number: Ints  # [T]
    sent: Ints  # [channels]
    posted: Ints  # [channels]
    done: Bools  # [T]


def make_bench(coded: Coded, rows: Rows, channel: Ints) -> Bench:
    """Working arrays for rows of this size."""
    size, n, ranks = coded.rank.shape[0], rows.tasks.shape[0], coded.num_ranks
    num_channels = int(channel.max(initial=-1)) + 1
    return Bench(
        place=np.zeros(size, np.int64),
        end=np.zeros(size),
        tail=np.zeros(size),
        order=np.zeros(n, np.int64),
        held=np.zeros(n),
        waiter=np.zeros(size, np.int64),
        at=np.zeros(ranks, np.int64),
        todo=np.zeros(ranks + 1, np.int64),
        pairs=np.zeros(n, np.int64),
        best=rows.tasks.copy(),
        channel=channel,
        number=np.zeros(size, np.int64),
        sent=np.zeros(num_channels, np.int64),
        posted=np.zeros(num_channels, np.int64),
        done=np.zeros(size, np.bool_),
    )


@compiled
def draw(state: Ints) -> float:
    """Uniform in [0, 1): a 31-bit linear congruential generator with its own state [1]."""
    state[0] = (state[0] * 25214903917 + 11) & 281474976710655
    return float(state[0] >> 17) / 2147483648.0


@compiled
def safe(rows: Rows, coded: Coded, bench: Bench, ahead: int) -> bool:
    """Whether the rows pass the channel check."""
    bench.sent[:] = 0
    bench.posted[:] = ahead
    bench.done[:] = False
    for rank in range(bench.at.shape[0]):
        bench.at[rank] = rows.first[rank]
    run_channels(
        rows,
        coded.pred,
        bench.channel,
        ahead,
        bench.number,
        bench.sent,
        bench.posted,
        bench.done,
        bench.at,
    )
    return bool(np.all(bench.at == rows.first[1:]))


@compiled
def _tail_after(coded: Coded, bench: Bench, task: int) -> float:
    """Longest path from the output of `task` (not through its row)."""
    target = coded.succ[task]
    if target < 0:
        return 0.0
    return float(coded.latency[target] + coded.duration[target] + bench.tail[target])


@compiled
def measure(rows: Rows, coded: Coded, bench: Bench, late: Floats) -> float:
    """Fill `end` and `tail`; the makespan, or -1 if tasks wait in a circle.

    `late` [T] is added behind each task: how much earlier than the makespan it must end.
    """
    n = rows.tasks.shape[0]
    if run_rows(rows, coded, bench.end, bench.waiter, bench.at, bench.todo, bench.order) < n:
        return -1.0
    longest = 0.0
    for i in range(n - 1, -1, -1):
        task = bench.order[i]
        tail = max(late[task], _tail_after(coded, bench, task))
        position = bench.place[task] + 1
        if position < rows.first[coded.rank[task] + 1]:
            follower = rows.tasks[position]
            tail = max(tail, coded.duration[follower] + bench.tail[follower])
        bench.tail[task] = tail
        longest = max(longest, bench.end[task] + tail)
    return longest


@compiled
def _may_swap(rows: Rows, coded: Coded, bench: Bench, cap: float, p: int) -> bool:
    """Whether order and memory allow the tasks at p and p + 1 to change places."""
    u, v = rows.tasks[p], rows.tasks[p + 1]
    if coded.chain[u] == coded.chain[v]:
        if coded.slot[u] == coded.slot[v]:
            return False
        same = coded.microbatch[u] == coded.microbatch[v]
        if same and coded.slot[v] == SLOT_W and coded.slot[u] == SLOT_B:
            return False
    if coded.pred[v] == u:
        return False
    level = bench.held[p] + coded.claim[v]
    if level > cap:
        return False
    return bool(level + coded.change[v] + coded.claim[u] <= cap)


@compiled
def _last_critical(
    rows: Rows, coded: Coded, bench: Bench, late: Floats, longest: float, state: Ints
) -> int:
    """A random last task of a critical path."""
    task, count = -1, 0
    for i in range(rows.tasks.shape[0]):
        t = rows.tasks[i]
        if bench.end[t] + late[t] >= longest - EPS:
            count += 1
            if draw(state) * count < 1.0:
                task = t
    return task


@compiled
def _collect(
    rows: Rows, coded: Coded, bench: Bench, late: Floats, longest: float, cap: float, state: Ints
) -> int:
    """Swappable pairs on one random critical path; their number."""
    task = _last_critical(rows, coded, bench, late, longest, state)
    found = 0
    while task >= 0:
        start = bench.end[task] - coded.duration[task]
        position = bench.place[task]
        before = -1
        if position > rows.first[coded.rank[task]]:
            u = rows.tasks[position - 1]
            if bench.end[u] >= start - EPS:
                before = u
                if _may_swap(rows, coded, bench, cap, position - 1):
                    bench.pairs[found] = position - 1
                    found += 1
        source = coded.pred[task]
        if source >= 0 and bench.end[source] + coded.latency[task] < start - EPS:
            source = -1
        by_row = before >= 0 and (source < 0 or draw(state) < 0.5)
        task = before if by_row else source
    return found


@compiled
def _ready(coded: Coded, bench: Bench, task: int) -> float:
    source = coded.pred[task]
    if source < 0:
        return float(coded.release[task])
    return float(max(coded.release[task], bench.end[source] + coded.latency[task]))


@compiled
def _path_after_swap(rows: Rows, coded: Coded, bench: Bench, late: Floats, p: int) -> float:
    """Longest path through either task if the tasks at p and p + 1 changed places."""
    u, v = rows.tasks[p], rows.tasks[p + 1]
    rank = coded.rank[u]
    free = bench.end[rows.tasks[p - 1]] if p > rows.first[rank] else 0.0
    end_v = max(free, _ready(coded, bench, v)) + coded.duration[v]
    end_u = max(end_v, _ready(coded, bench, u)) + coded.duration[u]
    tail_u = max(late[u], _tail_after(coded, bench, u))
    if p + 2 < rows.first[rank + 1]:
        follower = rows.tasks[p + 2]
        tail_u = max(tail_u, coded.duration[follower] + bench.tail[follower])
    through_v = end_v + max(late[v], _tail_after(coded, bench, v))
    return float(max(end_u + tail_u, through_v))


@compiled
def swap(rows: Rows, coded: Coded, bench: Bench, p: int) -> None:
    """The tasks at p and p + 1 change places."""
    u, v = rows.tasks[p], rows.tasks[p + 1]
    rows.tasks[p], rows.tasks[p + 1] = v, u
    bench.place[v], bench.place[u] = p, p + 1
    bench.held[p + 1] = bench.held[p] + coded.claim[v] + coded.change[v]


@compiled
def settle(rows: Rows, coded: Coded, bench: Bench) -> None:
    """Fill `place` and `held` from the rows."""
    for rank in range(coded.num_ranks):
        held = 0.0
        for p in range(rows.first[rank], rows.first[rank + 1]):
            task = rows.tasks[p]
            bench.place[task] = p
            bench.held[p] = held
            held += coded.claim[task] + coded.change[task]


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
    while found > 0:
        i = int(draw(state) * found)
        p = bench.pairs[i]
        allowed = threshold - temperature * np.log(draw(state) + 1e-12)
        if _path_after_swap(rows, coded, bench, late, p) <= allowed + EPS:
            return int(p)
        found -= 1
        bench.pairs[i] = bench.pairs[found]
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
    cooling = (cold / hot) ** (1.0 / max(1, moves))
    temperature = hot
    for _ in range(moves):
        if best <= target + EPS:
            return best
        temperature *= cooling
        found = _collect(rows, coded, bench, late, longest, cap, state)
        p = _pick(rows, coded, bench, late, found, longest, temperature, state)
        if p < 0:
            continue
        swap(rows, coded, bench, p)
        longest = measure(rows, coded, bench, late)
        if longest < 0.0 or (longest < best - EPS and not safe(rows, coded, bench, 1)):
            swap(rows, coded, bench, p)
            longest = measure(rows, coded, bench, late)
        elif longest < best - EPS:
            best = longest
            bench.best[:] = rows.tasks
    return best
