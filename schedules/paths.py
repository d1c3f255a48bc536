"""Longest paths to and from every task, kept up to date while neighbours of a row change places.

With the longest path to (`end`) and from (`tail`) every task at hand, only accepted swaps cost a
pass over tasks, and that pass ends where nothing changes any more.
"""

# Helpers take plain arrays, not tuples of arrays: passing a tuple costs a count per array.

from typing import NamedTuple

import numpy as np

from rlhfuse.schedules.compiled import SLOT_W, Bools, Coded, Floats, Ints, Rows, compiled, run_rows
from rlhfuse.schedules.timing import run_channels

EPS = 1e-9


class Bench(NamedTuple):
    """Working arrays of one search over schedules with N tasks; made once."""

    place: Ints  # [T] position of each task in the rows
    end: Floats  # [T]
    tail: Floats  # [T] longest path from the end of the task to the end of all
    order: Ints  # [N] tasks, predecessors first
    slot_of: Ints  # [T] position of each task in `order`
    held: Floats  # [N] memory before the task at this position
    mark: Ints  # [T] 1 where `end` or `tail` must be looked at again
    waiter: Ints  # [T]
    at: Ints  # [num_ranks]
    todo: Ints  # [num_ranks + 1]
    pairs: Ints  # [N] positions p whose tasks p, p + 1 may be swapped
    spare: Ints  # [N]
    known: Ints  # [N] tasks of the latest rows that passed the channel check
    best: Ints  # [N] tasks of the best rows so far
    due: Ints  # tasks with a deadline
    channel: Ints  # [T]
    number: Ints  # [T]
    sent: Ints  # [channels]
    posted: Ints  # [channels]
    done: Bools  # [T]


def make_bench(coded: Coded, rows: Rows, channel: Ints, due: Ints) -> Bench:
    """Working arrays for rows of this size; `due` are the tasks with a deadline."""
    size, n, ranks = coded.rank.shape[0], rows.tasks.shape[0], coded.num_ranks
    num_channels = int(channel.max(initial=-1)) + 1
    return Bench(
        place=np.zeros(size, np.int64),
        end=np.zeros(size),
        tail=np.zeros(size),
        order=np.zeros(n, np.int64),
        slot_of=np.zeros(size, np.int64),
        held=np.zeros(n),
        mark=np.zeros(size, np.int64),
        waiter=np.zeros(size, np.int64),
        at=np.zeros(ranks, np.int64),
        todo=np.zeros(ranks + 1, np.int64),
        pairs=np.zeros(n, np.int64),
        spare=np.zeros(n, np.int64),
        known=np.zeros(n, np.int64),
        best=rows.tasks.copy(),
        due=due,
        channel=channel,
        number=np.zeros(size, np.int64),
        sent=np.zeros(num_channels, np.int64),
        posted=np.zeros(num_channels, np.int64),
        done=np.zeros(size, np.bool_),
    )


@compiled
def complete(rows: Rows, coded: Coded) -> bool:
    """Whether every task is there once, on its rank, in its kind's order, and W after its I.

    (F comes before B where nothing waits in a circle: B needs it by way of the later stages.)
    """
    seen = np.zeros(3 * coded.base.shape[0], np.int64)
    for rank in range(coded.num_ranks):
        for p in range(rows.first[rank], rows.first[rank + 1]):
            task = rows.tasks[p]
            if task < 0 or task >= coded.rank.shape[0] or coded.rank[task] != rank:
                return False
            k, slot = coded.kind[task], coded.slot[task]
            if slot >= coded.chain_slots[coded.chain[task]] or coded.microbatch[task] != seen[k]:
                return False
            if slot == SLOT_W and seen[k - 1] <= seen[k]:
                return False
            seen[k] += 1
    return bool(seen.sum() == (coded.num_mb * coded.chain_slots).sum())


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
def _forward(coded: Coded, rows: Rows, bench: Bench, begin: int, p: int) -> None:
    """Bring `end` up to date from `order[begin]` on after the swap at p; stops when all agree."""
    tasks, first, order, place, end = rows.tasks, rows.first, bench.order, bench.place, bench.end
    rank, pred, latency, mark = coded.rank, coded.pred, coded.latency, bench.mark
    release, duration, succ = coded.release, coded.duration, coded.succ
    left = 0
    for position in range(p, min(p + 3, first[rank[tasks[p]] + 1])):
        mark[tasks[position]] = 1
        left += 1
    i = begin
    while left > 0:
        task = order[i]
        i += 1
        if mark[task] == 0:
            continue
        mark[task] = 0
        left -= 1
        position = place[task]
        start = max(
            release[task], end[tasks[position - 1]] if position > first[rank[task]] else 0.0
        )
        source = pred[task]
        if source >= 0:
            start = max(start, end[source] + latency[task])
        if start + duration[task] != end[task]:
            end[task] = start + duration[task]
            follower = tasks[position + 1] if position + 1 < first[rank[task] + 1] else -1
            for near in (follower, succ[task]):
                if near >= 0 and mark[near] == 0:
                    mark[near] = 1
                    left += 1


@compiled
def _longest_after(
    task: int,
    follower: int,
    floor: float,
    target: int,
    latency: Floats,
    duration: Floats,
    tail: Floats,
) -> float:
    """Longest path from the end of `task` to the end of all."""
    longest = floor
    if follower >= 0:
        longest = max(longest, duration[follower] + tail[follower])
    if target >= 0:
        longest = max(longest, latency[target] + duration[target] + tail[target])
    return float(longest)


@compiled
def _backward_all(coded: Coded, rows: Rows, bench: Bench, late: Floats) -> None:
    """Compute `tail` of every task."""
    tasks, first, order, place, tail = rows.tasks, rows.first, bench.order, bench.place, bench.tail
    rank, succ, latency, duration = coded.rank, coded.succ, coded.latency, coded.duration
    for i in range(order.shape[0] - 1, -1, -1):
        task = order[i]
        position = place[task] + 1
        follower = tasks[position] if position < first[rank[task] + 1] else -1
        tail[task] = _longest_after(task, follower, late[task], succ[task], latency, duration, tail)


@compiled
def _backward(coded: Coded, rows: Rows, bench: Bench, late: Floats, last: int, p: int) -> None:
    """Bring `tail` up to date from `order[last]` back after the swap at p."""
    tasks, first, order, place, tail = rows.tasks, rows.first, bench.order, bench.place, bench.tail
    rank, succ, latency, duration = coded.rank, coded.succ, coded.latency, coded.duration
    pred, mark = coded.pred, bench.mark
    left = 0
    for position in range(max(p - 1, first[rank[tasks[p]]]), p + 2):
        mark[tasks[position]] = 1
        left += 1
    i = last
    while left > 0:
        task = order[i]
        i -= 1
        if mark[task] == 0:
            continue
        mark[task] = 0
        left -= 1
        position = place[task]
        follower = tasks[position + 1] if position + 1 < first[rank[task] + 1] else -1
        longest = _longest_after(task, follower, late[task], succ[task], latency, duration, tail)
        if longest != tail[task]:
            tail[task] = longest
            before = tasks[position - 1] if position > first[rank[task]] else -1
            for near in (before, pred[task]):
                if near >= 0 and mark[near] == 0:
                    mark[near] = 1
                    left += 1


@compiled
def length_of(rows: Rows, bench: Bench, late: Floats) -> float:
    """Makespan, or more where a deadline is missed."""
    longest = 0.0
    for rank in range(rows.first.shape[0] - 1):
        if rows.first[rank + 1] > rows.first[rank]:
            longest = max(longest, bench.end[rows.tasks[rows.first[rank + 1] - 1]])
    for i in range(bench.due.shape[0]):
        longest = max(longest, bench.end[bench.due[i]] + late[bench.due[i]])
    return float(longest)


@compiled
def measure(rows: Rows, coded: Coded, bench: Bench, late: Floats) -> float:
    """Fill `end`, `tail` and `order`; the makespan, or -1 if tasks wait in a circle.

    `late` [T] is added behind each task: how much earlier than the makespan it must end.
    """
    n = rows.tasks.shape[0]
    if run_rows(rows, coded, bench.end, bench.waiter, bench.at, bench.todo, bench.order) < n:
        return -1.0
    for i in range(n):
        bench.slot_of[bench.order[i]] = i
    _backward_all(coded, rows, bench, late)
    return length_of(rows, bench, late)


@compiled
def _exchange(rows: Rows, coded: Coded, bench: Bench, p: int) -> None:
    """The tasks at p and p + 1 change places in their row."""
    u, v = rows.tasks[p], rows.tasks[p + 1]
    rows.tasks[p], rows.tasks[p + 1] = v, u
    bench.place[v], bench.place[u] = p, p + 1
    bench.held[p + 1] = bench.held[p] + coded.claim[v] + coded.change[v]


@compiled
def _reorder(
    u: int,
    v: int,
    order: Ints,
    index: Ints,
    start: float,
    spare: Ints,
    end: Floats,
    duration: Floats,
) -> None:
    """Repair `order` after v (which started at `start`, when u ended) went before u.

    Between the two stand tasks that start before v (v may need them; none needs u) and tasks that
    start no earlier (u may be needed; v needs none): the former go first, then v, u, the latter.
    """
    begin, stop = index[u], index[v]
    count, at = 0, begin
    for i in range(begin + 1, stop):
        task = order[i]
        if end[task] - duration[task] < start - EPS:
            order[at] = task
            index[task] = at
            at += 1
        else:
            spare[count] = task
            count += 1
    order[at], order[at + 1] = v, u
    index[v], index[u] = at, at + 1
    for i in range(count):
        order[at + 2 + i] = spare[i]
        index[spare[i]] = at + 2 + i


@compiled
def _any_instant(order: Ints, duration: Floats, begin: int, stop: int) -> bool:
    """Whether a task from `order[begin]` to `order[stop]` takes no time.

    Through such a task the second of a tight pair may need the first.
    """
    for i in range(begin, stop + 1):  # noqa: SIM110  (compiled)
        if duration[order[i]] <= EPS:
            return True
    return False


@compiled
def swap(rows: Rows, coded: Coded, bench: Bench, late: Floats, p: int) -> float:
    """Swap a tight critical pair and bring everything up to date; the makespan, -1 for a circle."""
    u, v = rows.tasks[p], rows.tasks[p + 1]
    begin, stop = bench.slot_of[u], bench.slot_of[v]
    start = bench.end[v] - coded.duration[v]
    _exchange(rows, coded, bench, p)
    if _any_instant(bench.order, coded.duration, begin, stop):
        return measure(rows, coded, bench, late)
    _reorder(u, v, bench.order, bench.slot_of, start, bench.spare, bench.end, coded.duration)
    _forward(coded, rows, bench, begin, p)
    _backward(coded, rows, bench, late, stop, p)
    return length_of(rows, bench, late)
