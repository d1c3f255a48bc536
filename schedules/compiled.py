"""Problems and schedules as arrays, and the compiled simulator that all searches share.

A *chain* is one pp_stage of one pipeline, numbered in file order. Each micro-batch of a chain has
three slots: F (0), B or I (1) and W (2). Task id = base[chain] + slot * microbatches + microbatch;
ids of tasks that do not exist (W where the backward is whole) are simply never used.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

from rlhfuse.schedules.ir import Op, Problem, Schedule, Task

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Function = TypeVar("Function", bound=Callable[..., object])

SLOT_F, SLOT_B, SLOT_W = 0, 1, 2


def compiled(function: Function) -> Function:
    """Numba's njit, cached on disk; nothing is compiled before the first call."""
    return cast(Function, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


def inlined(function: Function) -> Function:
    """A helper that disappears into its compiled callers (a call would count references)."""
    return cast(Function, numba.njit(inline="always", error_model="numpy")(function))


@compiled
def draw(state: "Ints") -> float:
    """Uniform in [0, 1): a 48-bit linear congruential generator with its own state [1]."""
    state[0] = (state[0] * 25214903917 + 11) & 281474976710655
    return float(state[0] >> 17) / 2147483648.0


class Coded(NamedTuple):
    """One problem as arrays, per task [T] and per chain [C], in the problem's own units."""

    rank: Ints  # [T]
    pred: Ints  # [T] task whose output this one needs, -1 if none (W needs only its row's order)
    succ: Ints  # [T] task that needs this one's output (W excepted), -1 if none
    latency: Floats  # [T] delay from pred
    duration: Floats  # [T]
    release: Floats  # [T] earliest start
    claim: Floats  # [T] memory added at the start
    change: Floats  # [T] memory added at the end
    chain: Ints  # [T]
    slot: Ints  # [T]
    microbatch: Ints  # [T]
    kind: Ints  # [T] 3 * chain + slot: tasks of one kind run in order
    needs: Ints  # [T] pred, and for W its I: what must come before on the same rank
    base: Ints  # [C]
    num_mb: Ints  # [C] micro-batches
    chain_rank: Ints  # [C]
    chain_slots: Ints  # [C] 1 forward only, 2 F and B, 3 F, I and W
    num_ranks: int


def encode(problem: Problem, split: Sequence[bool]) -> Coded:
    """`problem` with the backward of pipeline i split into I and W where ``split[i]``.

    A pipeline without backward, or with no weight part at all, is never split.
    """
    size = 3 * sum(p.num_stages * p.num_microbatches for p in problem.pipelines)
    ints = {k: np.full(size, -1, np.int64) for k in ("rank", "pred", "succ", "chain", "slot", "mb")}
    flts = {k: np.zeros(size) for k in ("lat", "dur", "rel", "claim", "change")}
    chains: list[tuple[int, int, int, int]] = []
    base = 0
    for pipe, wanted in zip(problem.pipelines, split, strict=True):
        m, last = pipe.num_microbatches, pipe.num_stages - 1
        weights, mbs = np.asarray(pipe.microbatch_weights), np.arange(m)
        kind = 1 if pipe.forward_only else 3 if wanted and any(pipe.weight) else 2
        for stage, rank in enumerate(pipe.stages):
            f, b, w = (base + slot * m + mbs for slot in range(3))
            every = slice(base, base + 3 * m)
            ints["rank"][every], ints["chain"][every] = rank, len(chains)
            ints["slot"][every], ints["mb"][every] = np.repeat(range(3), m), np.tile(mbs, 3)
            ops = ((f, Op.F), (b, Op.B if kind == 2 else Op.I), (w, Op.W))[:kind]
            for ids, op in ops:
                flts["dur"][ids] = pipe.duration(op, stage) * weights
                claim, change = pipe.memory_change(op, stage)
                flts["claim"][ids], flts["change"][ids] = claim * weights, change * weights
            if stage == 0:
                flts["rel"][f] = pipe.release
            else:
                ints["pred"][f] = f - 3 * m
                ints["succ"][f - 3 * m] = f
                flts["lat"][f] = problem.latency(pipe.stages[stage - 1], rank)
            if kind > 1:
                source = f if stage == last else b + 3 * m
                ints["pred"][b] = source
                ints["succ"][source] = b
                if stage < last:
                    flts["lat"][b] = problem.latency(pipe.stages[stage + 1], rank)
            chains.append((base, m, rank, kind))
            base += 3 * m
    bases, counts, ranks, slots = np.array(chains, np.int64).T.copy()
    return Coded(
        ints["rank"],
        ints["pred"],
        ints["succ"],
        flts["lat"],
        flts["dur"],
        flts["rel"],
        flts["claim"],
        flts["change"],
        ints["chain"],
        ints["slot"],
        ints["mb"],
        3 * ints["chain"] + ints["slot"],
        np.where(ints["slot"] == SLOT_W, np.arange(size) - counts[ints["chain"]], ints["pred"]),
        bases,
        counts,
        ranks,
        slots,
        problem.num_ranks,
    )


class Rows(NamedTuple):
    """A schedule as arrays: rank r runs ``tasks[first[r]:first[r + 1]]`` in that order."""

    tasks: Ints  # [N]
    first: Ints  # [num_ranks + 1]


def encode_rows(schedule: Schedule, coded: Coded) -> Rows:
    """The rows of a schedule as ids. Whether a backward is whole or split does not change ids."""
    base: dict[str, list[int]] = {}
    chain = 0
    for pipe in schedule.problem.pipelines:
        base[pipe.name] = [int(b) for b in coded.base[chain : chain + pipe.num_stages]]
        chain += pipe.num_stages
    counts = {pipe.name: pipe.num_microbatches for pipe in schedule.problem.pipelines}
    slot = {Op.F: SLOT_F, Op.B: SLOT_B, Op.I: SLOT_B, Op.W: SLOT_W}
    ids = [
        base[t.pipeline][t.pp_stage] + slot[t.op] * counts[t.pipeline] + t.microbatch
        for row in schedule.rows
        for t in row
    ]
    first = np.cumsum([0, *(len(row) for row in schedule.rows)])
    return Rows(np.asarray(ids, np.int64), first.astype(np.int64))


def encode_schedule(schedule: Schedule) -> tuple[Coded, Rows]:
    """A schedule with its own mixture of B and I + W, ready to simulate."""
    problem = schedule.problem
    split = [False] * len(problem.pipelines)
    coded = encode(problem, split)
    rows = encode_rows(schedule, coded)
    for task, id_ in zip((t for row in schedule.rows for t in row), rows.tasks, strict=True):
        if task.op in (Op.I, Op.W):
            pipe = problem.pipeline(task.pipeline)
            coded.duration[id_] = pipe.duration(task.op, task.pp_stage, task.microbatch)
            claim, change = pipe.memory_change(task.op, task.pp_stage, task.microbatch)
            coded.claim[id_], coded.change[id_] = claim, change
    return coded, rows


def decode(problem: Problem, coded: Coded, rows: Rows) -> Schedule:
    """The schedule that `rows` spells."""
    labels: list[tuple[str, int]] = [
        (pipe.name, stage) for pipe in problem.pipelines for stage in range(pipe.num_stages)
    ]
    ops = [((Op.F, Op.B, Op.W), (Op.F, Op.I, Op.W))[int(slots == 3)] for slots in coded.chain_slots]
    chains = coded.chain[rows.tasks].tolist()
    slots = coded.slot[rows.tasks].tolist()
    mbs = coded.microbatch[rows.tasks].tolist()
    tasks = [
        Task(labels[c][0], ops[c][s], labels[c][1], j)
        for c, s, j in zip(chains, slots, mbs, strict=True)
    ]
    first = rows.first.tolist()
    return Schedule(problem, tuple(tuple(tasks[a:b]) for a, b in pairwise(first)))


@compiled
def run_rows(
    rows: Rows,
    coded: Coded,
    end: Floats,
    waiter: Ints,
    at: Ints,
    todo: Ints,
    order: Ints,
) -> int:
    """Start everything as early as the rows allow; how many tasks could run.

    Fills `end` [T] (when each task ends) and `order` [N] (tasks, predecessors first). `waiter`
    [T], `at` and `todo` [ranks] are scratch. Fewer than N tasks done means a circle of waiting.
    """
    tasks, first = rows.tasks, rows.first
    pred, latency, duration, release = coded.pred, coded.latency, coded.duration, coded.release
    num_ranks = first.shape[0] - 1
    for i in range(tasks.shape[0]):
        end[tasks[i]] = -1.0
        waiter[tasks[i]] = -1
    for rank in range(num_ranks):
        at[rank] = first[rank]
        todo[rank] = num_ranks - 1 - rank
    left = num_ranks
    done = 0
    while left > 0:
        left -= 1
        rank = todo[left]
        here, last = at[rank], first[rank + 1]
        now = end[tasks[here - 1]] if here > first[rank] else 0.0
        while here < last:
            task = tasks[here]
            ready = release[task]
            source = pred[task]
            if source >= 0:
                arrival = end[source]
                if arrival < 0.0:
                    waiter[source] = rank
                    break
                ready = max(ready, arrival + latency[task])
            now = max(now, ready) + duration[task]
            end[task] = now
            order[done] = task
            done += 1
            here += 1
            if waiter[task] >= 0:
                todo[left] = waiter[task]
                left += 1
        at[rank] = here
    return done
