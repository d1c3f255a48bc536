"""Lower bounds on the makespan and on peak memory, valid for every problem the IR can say."""

import heapq

import numpy as np

from rlhfuse.schedules.compiled import SLOT_F, SLOT_W, Coded, Floats, compiled, encode
from rlhfuse.schedules.ir import Problem


def latency_bound(problem: Problem, *, split_weight: bool) -> float:
    """No schedule of the problem ends earlier; `split_weight` allows I and W.

    Proof. Let head(t) be a time before which task t cannot start and tail(t) a time that must
    pass after its end, both whatever the other pipelines do (see `_heads` and `_tails`). Tasks of
    one rank exclude each other, so the makespan is at least that of the one-machine problem with
    these heads and tails, which in turn is at least that of its preemptive version, which Jackson's
    rule (always run the available task with the longest tail) solves exactly (Carlier 1982).
    A split backward never ends later than a whole one with the same start, so the bound for split
    tasks covers mixtures of B and I + W.
    """
    coded = encode(problem, [split_weight] * len(problem.pipelines))
    return coded_latency_bound(coded)


def coded_latency_bound(coded: Coded) -> float:
    """`latency_bound` of a problem in arrays."""
    heads, tails = _heads(coded), _tails(coded)
    best = 0.0
    for rank in range(coded.num_ranks):
        real = coded.slot < coded.chain_slots[coded.chain]
        mine = np.flatnonzero((coded.rank == rank) & real)
        if mine.size:
            by_head = mine[np.argsort(heads[mine], kind="stable")]
            bound = _jackson(heads[by_head], coded.duration[by_head], tails[by_head])
            best = max(best, bound)
    return best


def memory_bound(problem: Problem, makespan: float) -> float:
    """No schedule that ends by `makespan` has a lower peak memory.

    Proof. (1) Some micro-batch of each pipeline is forwarded on all stages before its backward
    starts anywhere, so a rank holds at least one micro-batch of all the pipeline's stages on it.
    (2) Micro-batch j of stage s is held from the start of its F to the end of its B or I, which
    takes at least the time of all tasks on its way (`_hold_times`). Memory integrated over time is
    at least the sum of these areas; divided by the time in which the rank can hold anything,
    it is at most the peak.
    """
    best = 0.0
    area = np.zeros(problem.num_ranks)
    for pipe in problem.pipelines:
        weights = np.asarray(pipe.microbatch_weights)
        at_once = np.zeros(problem.num_ranks)
        for stage, rank in enumerate(pipe.stages):
            held = pipe.activation[stage]
            at_once[rank] = max(at_once[rank], held) if pipe.forward_only else at_once[rank] + held
            unit, fixed = _hold_time(problem, stage, pipe.name)
            area[rank] += float((held * weights * (unit * weights + fixed)).sum())
        best = max(best, float(at_once.max() * weights.max()))
    return max(best, float(area.max()) / makespan) if makespan > 0 else best


def _hold_time(problem: Problem, stage: int, name: str) -> tuple[float, float]:
    """Least time from the start of F to the end of the input gradient: (per weight, fixed)."""
    pipe = problem.pipeline(name)
    if pipe.forward_only:
        return pipe.forward[stage], 0.0
    unit = sum(pipe.forward[s] for s in range(stage, pipe.num_stages))
    unit += sum(pipe.backward[s] - pipe.weight[s] for s in range(stage, pipe.num_stages))
    links = zip(pipe.stages[stage:], pipe.stages[stage + 1 :], strict=False)
    return unit, sum(problem.latency(a, b) + problem.latency(b, a) for a, b in links)


@compiled
def _heads(coded: Coded) -> Floats:
    """Earliest start of each task [T].

    Its input must have come; tasks of its kind and chain run in order; and before a B (or I) of
    micro-batch j its chain has run F of 0..j and B of 0..j-1, before a W also all I up to j; a W
    comes after its own I.
    Chains are visited along the pipeline (F up, B down), so inputs are known.
    """
    head = np.zeros(coded.rank.shape[0])
    chains = coded.base.shape[0]
    for chain in range(chains):
        _head_of_slot(coded, head, chain, SLOT_F)
    for back in range(chains):
        chain = chains - 1 - back
        for slot in range(1, coded.chain_slots[chain]):
            _head_of_slot(coded, head, chain, slot)
    return head


@compiled
def _head_of_slot(coded: Coded, head: Floats, chain: int, slot: int) -> None:
    base, m = coded.base[chain], coded.num_mb[chain]
    work = head[base]  # time by which the chain can have done what must come before
    before = 0.0
    for mb in range(m):
        task = base + slot * m + mb
        earliest = max(coded.release[task], before)
        source = coded.needs[task]  # for a W its I
        if source >= 0:
            arrival = head[source] + coded.duration[source] + coded.latency[task]
            earliest = max(earliest, arrival)
        if slot > SLOT_F:
            for lower in range(slot):
                work += coded.duration[base + lower * m + mb]
            earliest = max(earliest, work)
        head[task] = earliest
        before = earliest + coded.duration[task]
        if slot > SLOT_F:
            work += coded.duration[task]


@compiled
def _tails(coded: Coded) -> Floats:
    """Least time from the end of each task [T] to the end of all; `_heads` seen backwards."""
    tail = np.zeros(coded.rank.shape[0])
    chains = coded.base.shape[0]
    for chain in range(chains):
        for back in range(coded.chain_slots[chain] - 1):
            _tail_of_slot(coded, tail, chain, coded.chain_slots[chain] - 1 - back)
    for back in range(chains):
        _tail_of_slot(coded, tail, chains - 1 - back, SLOT_F)
    return tail


@compiled
def _tail_of_slot(coded: Coded, tail: Floats, chain: int, slot: int) -> None:
    base, m, slots = coded.base[chain], coded.num_mb[chain], coded.chain_slots[chain]
    work = 0.0  # what the chain must still do after the task, plus the least tail behind that
    if slots > 1:
        work = tail[base + (slots - 1) * m + m - 1]
        if slots > SLOT_W:
            # The last of I and W may be either: only the smaller tail is sure.
            work = 0.0
    after = 0.0
    for back in range(m):
        mb = m - 1 - back
        task = base + slot * m + mb
        least = after
        target = coded.succ[task]
        if target >= 0:
            least = max(least, coded.latency[target] + coded.duration[target] + tail[target])
        for higher in range(slot + 1, slots):
            work += coded.duration[base + higher * m + mb]
        if slot < slots - 1:
            least = max(least, work)
            work += coded.duration[task]
        tail[task] = least
        after = least + coded.duration[task]


@compiled
def _jackson(heads: Floats, durations: Floats, tails: Floats) -> float:
    """Makespan of the preemptive one-machine problem; tasks sorted by head."""
    queue = [(0.0, 0.0)]  # (-tail, time left); the first entry gives the list its type
    queue.clear()
    longest, now, come, n = 0.0, 0.0, 0, heads.shape[0]
    while come < n or len(queue) > 0:
        if len(queue) == 0:
            now = max(now, heads[come])
        while come < n and heads[come] <= now:
            heapq.heappush(queue, (-tails[come], durations[come]))
            come += 1
        urgency, left = heapq.heappop(queue)
        until = heads[come] if come < n else np.inf
        if now + left <= until:
            now += left
            longest = max(longest, now - urgency)
        else:
            heapq.heappush(queue, (urgency, left - (until - now)))
            now = until
    return longest
