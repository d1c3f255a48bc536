"""List scheduling: whenever a rank is free it takes the most urgent task that may start.

A task may start when its input has arrived, the memory cap holds with room kept for one
micro-batch of every other chain of the rank (so nothing can get stuck), the chain's limit of
micro-batches in flight allows it, and its receiver has at most one message unread (so the result
passes the channel check).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlhfuse.schedules.compiled import (
    SLOT_B,
    SLOT_F,
    SLOT_W,
    Coded,
    Floats,
    Ints,
    Rows,
    compiled,
    decode,
    encode,
)
from rlhfuse.schedules.ir import Problem, Schedule

NEVER = 1e300


class Desk(NamedTuple):
    """Working arrays of one dispatcher; made once, used for every run."""

    chain_first: Ints  # [num_ranks + 1] chains of rank r: chain_list[first[r]:first[r + 1]]
    chain_list: Ints  # [C]
    largest: Floats  # [C] memory of the heaviest micro-batch
    unread: Ints  # [C, 2] how many messages of (chain, slot) may be unread
    next: Ints  # [C, 3] next micro-batch of each slot
    ready: Floats  # [C, 3] when the input of the next task is there
    starts: Floats  # [C, 3] when the next task could start
    end: Floats  # [T]
    free: Floats  # [num_ranks]
    held: Floats  # [num_ranks]
    best_task: Ints  # [num_ranks]
    best_start: Floats  # [num_ranks]
    tasks: Ints  # [num_ranks, most tasks of a rank] rows being written
    length: Ints  # [num_ranks]


class Policy(NamedTuple):
    """What a dispatcher is told: the smallest key goes first."""

    key: Floats  # [T]
    limit: Ints  # [C] micro-batches in flight
    window: float  # a task up to this much later may go first if it is more urgent
    cap: float


def make_desk(coded: Coded) -> Desk:
    """Working arrays for problems of this shape."""
    ranks, chains = coded.num_ranks, coded.base.shape[0]
    order = np.argsort(coded.chain_rank, kind="stable")
    first = np.searchsorted(coded.chain_rank[order], np.arange(ranks + 1))
    largest = np.zeros(chains)
    np.maximum.at(largest, coded.chain, coded.claim)
    work = np.bincount(coded.chain_rank, coded.num_mb * coded.chain_slots, ranks)
    return Desk(
        chain_first=first.astype(np.int64),
        chain_list=order.astype(np.int64),
        largest=largest,
        unread=_unread_limits(coded),
        next=np.zeros((chains, 3), np.int64),
        ready=np.zeros((chains, 3)),
        starts=np.zeros((chains, 3)),
        end=np.zeros(coded.rank.shape[0]),
        free=np.zeros(ranks),
        held=np.zeros(ranks),
        best_task=np.zeros(ranks, np.int64),
        best_start=np.zeros(ranks),
        tasks=np.zeros((ranks, int(work.max())), np.int64),
        length=np.zeros(ranks, np.int64),
    )


def _unread_limits(coded: Coded) -> Ints:
    """Two messages may be unread on a link (see `timing`); no bound on one rank."""
    limits = np.full((coded.base.shape[0], 2), 1 << 40, np.int64)
    target = coded.succ
    crosses = (target >= 0) & (coded.rank[target] != coded.rank) & (coded.slot < SLOT_W)
    limits[coded.chain[crosses], coded.slot[crosses]] = 2
    return limits


def rows_of(desk: Desk) -> Rows:
    """The rows that the last run left on the desk."""
    first = np.concatenate([np.zeros(1, np.int64), np.cumsum(desk.length)])
    parts = [desk.tasks[r, : desk.length[r]] for r in range(desk.length.shape[0])]
    return Rows(np.concatenate(parts), first)


def dispatch_pipeline(problem: Problem, limits: Sequence[int]) -> Schedule:
    """Backward first, oldest first, at most `limits` in flight per chain: 1F1B on any stage map."""
    coded = encode(problem, [False] * len(problem.pipelines))
    desk = make_desk(coded)
    key = coded.microbatch + 1e6 * (coded.slot == SLOT_F)
    policy = Policy(key.astype(np.float64), np.asarray(limits, np.int64), 0.0, NEVER)
    dispatch(coded, desk, policy)
    return decode(problem, coded, rows_of(desk))


@compiled
def _room(
    rank: int,
    chain: int,
    free_memory: float,
    next_mb: Ints,
    num_mb: Ints,
    slots: Ints,
    chain_first: Ints,
    chain_list: Ints,
    largest: Floats,
) -> float:
    """Memory that `chain` may claim: what is free less one micro-batch of every idle chain."""
    for i in range(chain_first[rank], chain_first[rank + 1]):
        other = chain_list[i]
        begun = next_mb[other, 0]
        if other != chain and begun < num_mb[other] and begun == next_mb[other, slots[other] - 1]:
            free_memory -= largest[other]
    return free_memory


@compiled
def _arrival(
    task: int,
    mb: int,
    pred: Ints,
    succ: Ints,
    kind: Ints,
    next_mb: Ints,
    end: Floats,
    release: Floats,
    latency: Floats,
    unread: int,
) -> float:
    """When the input of `task` is there, NEVER if not known or its output could not be sent."""
    ready = float(release[task])
    source = pred[task]
    if source >= 0:
        if next_mb[kind[source] // 3, kind[source] % 3] <= mb:
            return NEVER
        ready = max(ready, float(end[source] + latency[task]))
    target = succ[task]
    if target >= 0 and mb - next_mb[kind[target] // 3, kind[target] % 3] >= unread:
        return NEVER
    return ready


@compiled
def _refresh(coded: Coded, desk: Desk, task: int) -> None:
    """Bring `ready` up to date after `task` for its chain and the chains it talks to."""
    next_mb, ready, unread, end = desk.next, desk.ready, desk.unread, desk.end
    base, num_mb, kind, slots = coded.base, coded.num_mb, coded.kind, coded.chain_slots
    pred, succ, release, latency = coded.pred, coded.succ, coded.release, coded.latency
    for which in range(4):
        near = task
        if which == 1:
            near = succ[task]
        elif which == 2:
            near = pred[task]
        if near < 0:
            continue
        chain, slot = kind[near] // 3, kind[near] % 3
        if which == 3:
            slot = slots[chain] - 1
        mb = next_mb[chain, slot]
        if mb >= num_mb[chain]:
            ready[chain, slot] = NEVER
        elif slot == SLOT_W:
            ready[chain, slot] = 0.0 if mb < next_mb[chain, SLOT_B] else NEVER
        else:
            ready[chain, slot] = _arrival(
                base[chain] + slot * num_mb[chain] + mb,
                mb,
                pred,
                succ,
                kind,
                next_mb,
                end,
                release,
                latency,
                unread[chain, slot],
            )


@compiled
def _starts(
    chain: int,
    free: float,
    memory: float,
    room: float,
    next_mb: Ints,
    ready: Floats,
    slots: Ints,
    limit: Ints,
    need: float,
    starts: Floats,
) -> float:
    """Fill `starts` of one chain; the earliest. `room` is `memory` less what others may need."""
    earliest = NEVER
    for slot in range(slots[chain]):
        start = max(free, ready[chain, slot])
        if slot == SLOT_F:
            flight = next_mb[chain, SLOT_F] - next_mb[chain, slots[chain] - 1]
            if need > min(room, memory) or (slots[chain] > 1 and flight >= limit[chain]):
                start = NEVER
        starts[chain, slot] = start
        earliest = min(earliest, start)
    return earliest


@compiled
def _choose(coded: Coded, desk: Desk, policy: Policy, task: int) -> None:
    """Put the best next task into best_task and best_start of the ranks that `task` touched."""
    next_mb, ready, key, base = desk.next, desk.ready, policy.key, coded.base
    num_mb, slots, claim = coded.num_mb, coded.chain_slots, coded.claim
    chain_first, chain_list, largest = desk.chain_first, desk.chain_list, desk.largest
    limit, starts = policy.limit, desk.starts
    for near in (task, coded.succ[task], coded.pred[task]):
        rank = coded.rank[near]
        if near < 0 or (near != task and rank == coded.rank[task]):
            continue
        free, memory = desk.free[rank], policy.cap - desk.held[rank]
        earliest = NEVER
        for i in range(chain_first[rank], chain_first[rank + 1]):
            chain = chain_list[i]
            need, room = 0.0, memory
            if next_mb[chain, SLOT_F] < num_mb[chain]:
                need = claim[base[chain] + next_mb[chain, SLOT_F]]
                room = _room(
                    rank, chain, memory, next_mb, num_mb, slots, chain_first, chain_list, largest
                )
            first = _starts(chain, free, memory, room, next_mb, ready, slots, limit, need, starts)
            earliest = min(earliest, first)
        best, latest = NEVER, min(earliest + policy.window, 0.5 * NEVER)
        desk.best_start[rank] = NEVER
        for i in range(chain_first[rank], chain_first[rank + 1]):
            chain = chain_list[i]
            for slot in range(slots[chain]):
                if starts[chain, slot] <= latest:
                    option = base[chain] + slot * num_mb[chain] + next_mb[chain, slot]
                    if key[option] < best:
                        best = key[option]
                        desk.best_task[rank] = option
                        desk.best_start[rank] = starts[chain, slot]


@compiled
def _commit(coded: Coded, desk: Desk, rank: int) -> int:
    """Run the rank's best task; its id."""
    task = desk.best_task[rank]
    finish = desk.best_start[rank] + coded.duration[task]
    desk.end[task] = finish
    desk.free[rank] = finish
    desk.held[rank] += coded.claim[task] + coded.change[task]
    desk.next[coded.chain[task], coded.slot[task]] += 1
    desk.tasks[rank, desk.length[rank]] = task
    desk.length[rank] += 1
    return int(task)


@compiled
def _clear(coded: Coded, desk: Desk, policy: Policy) -> int:
    """An empty desk; the number of tasks to run."""
    desk.next[:] = 0
    desk.free[:] = 0.0
    desk.held[:] = 0.0
    desk.length[:] = 0
    desk.best_start[:] = NEVER
    total = 0
    for chain in range(coded.base.shape[0]):
        total += coded.num_mb[chain] * coded.chain_slots[chain]
        for slot in range(coded.chain_slots[chain]):
            _refresh(coded, desk, coded.base[chain] + slot * coded.num_mb[chain])
    for chain in range(coded.base.shape[0]):
        _choose(coded, desk, policy, coded.base[chain])
    return total


@compiled
def dispatch(coded: Coded, desk: Desk, policy: Policy) -> float:
    """Makespan of the schedule left on the desk; infinite if tasks got stuck."""
    best_start = desk.best_start
    total = _clear(coded, desk, policy)
    for _ in range(total):
        rank = 0
        for other in range(1, coded.num_ranks):
            if best_start[other] < best_start[rank]:
                rank = other
        if best_start[rank] >= NEVER:
            return np.inf
        task = _commit(coded, desk, rank)
        _refresh(coded, desk, task)
        _choose(coded, desk, policy, task)
    return float(desk.free.max())
