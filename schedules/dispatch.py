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
    lookahead: Ints  # [C, 2] messages of (chain, slot) that may be unread; large: no bound
    next: Ints  # [C, 3] next micro-batch of each slot
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
        lookahead=np.full((chains, 2), 2, np.int64),
        next=np.zeros((chains, 3), np.int64),
        end=np.zeros(coded.rank.shape[0]),
        free=np.zeros(ranks),
        held=np.zeros(ranks),
        best_task=np.zeros(ranks, np.int64),
        best_start=np.zeros(ranks),
        tasks=np.zeros((ranks, int(work.max())), np.int64),
        length=np.zeros(ranks, np.int64),
    )


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
def _forward_fits(coded: Coded, desk: Desk, policy: Policy, chain: int, task: int) -> bool:
    """Whether memory and the chain's limit let one more micro-batch in."""
    flight = desk.next[chain, SLOT_F] - desk.next[chain, max(0, coded.chain_slots[chain] - 1)]
    if coded.chain_slots[chain] > 1 and flight >= policy.limit[chain]:
        return False
    rank = coded.chain_rank[chain]
    room = policy.cap - desk.held[rank] - coded.claim[task]
    for i in range(desk.chain_first[rank], desk.chain_first[rank + 1]):
        other = desk.chain_list[i]
        begun = desk.next[other, SLOT_F]
        ended = desk.next[other, coded.chain_slots[other] - 1]
        if other != chain and begun == ended and begun < coded.num_mb[other]:
            room -= desk.largest[other]
    return bool(room >= 0.0)


@compiled
def _start_of(coded: Coded, desk: Desk, policy: Policy, chain: int, slot: int) -> float:
    """When the next task of (chain, slot) could start, NEVER if that is not known yet."""
    mb = desk.next[chain, slot]
    if mb >= coded.num_mb[chain]:
        return NEVER
    task = coded.base[chain] + slot * coded.num_mb[chain] + mb
    ready = max(desk.free[coded.chain_rank[chain]], coded.release[task])
    if slot == SLOT_W:
        return ready if mb < desk.next[chain, SLOT_B] else NEVER
    source = coded.pred[task]
    if source >= 0:
        sender = coded.chain[source]
        if desk.next[sender, coded.slot[source]] <= mb:
            return NEVER
        ready = max(ready, float(desk.end[source] + coded.latency[task]))
    target = coded.succ[task]
    if target >= 0 and coded.rank[target] != coded.rank[task]:
        read = desk.next[coded.chain[target], coded.slot[target]]
        if mb - read >= desk.lookahead[chain, slot]:
            return NEVER
    if slot == SLOT_F and not _forward_fits(coded, desk, policy, chain, task):
        return NEVER
    return float(ready)


@compiled
def _choose(coded: Coded, desk: Desk, policy: Policy, rank: int) -> None:
    """Put the rank's best next task into best_task and best_start."""
    earliest = NEVER
    for i in range(desk.chain_first[rank], desk.chain_first[rank + 1]):
        chain = desk.chain_list[i]
        for slot in range(coded.chain_slots[chain]):
            earliest = min(earliest, _start_of(coded, desk, policy, chain, slot))
    desk.best_start[rank] = NEVER
    if earliest >= NEVER:
        return
    best = NEVER
    for i in range(desk.chain_first[rank], desk.chain_first[rank + 1]):
        chain = desk.chain_list[i]
        for slot in range(coded.chain_slots[chain]):
            start = _start_of(coded, desk, policy, chain, slot)
            if start <= earliest + policy.window:
                task = coded.base[chain] + slot * coded.num_mb[chain] + desk.next[chain, slot]
                if policy.key[task] < best:
                    best = policy.key[task]
                    desk.best_task[rank] = task
                    desk.best_start[rank] = start


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
def dispatch(coded: Coded, desk: Desk, policy: Policy) -> float:
    """Makespan of the schedule left on the desk; infinite if tasks got stuck."""
    desk.next[:] = 0
    desk.free[:] = 0.0
    desk.held[:] = 0.0
    desk.length[:] = 0
    for rank in range(coded.num_ranks):
        _choose(coded, desk, policy, rank)
    total = 0
    for chain in range(coded.base.shape[0]):
        total += coded.num_mb[chain] * coded.chain_slots[chain]
    for _ in range(total):
        rank = 0
        for other in range(1, coded.num_ranks):
            if desk.best_start[other] < desk.best_start[rank]:
                rank = other
        if desk.best_start[rank] >= NEVER:
            return np.inf
        task = _commit(coded, desk, rank)
        _choose(coded, desk, policy, rank)
        for near in (coded.succ[task], coded.pred[task]):
            if near >= 0 and coded.rank[near] != rank:
                _choose(coded, desk, policy, coded.rank[near])
    return float(desk.free.max())
