"""The front door: the best schedule found for several pipelines on the same ranks."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rlhfuse.schedules.bounds import coded_latency_bound
from rlhfuse.schedules.compiled import (
    SLOT_F,
    SLOT_W,
    Coded,
    Floats,
    Rows,
    decode,
    encode,
)
from rlhfuse.schedules.dispatch import NEVER, Policy, dispatch, make_desk, rows_of
from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.local import Bench, anneal, make_bench, measure, safe, settle
from rlhfuse.schedules.search import Ground, express, make_genes, trials
from rlhfuse.schedules.standard import serial
from rlhfuse.schedules.timing import channel_numbers, makespan

DEFAULT_ROUNDS = 40
TRIALS = 24  # list schedules per round
MOVES = 4000  # local search moves per round


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
    on_progress: Callable[[Progress], None] | None = None,
) -> Schedule:
    """The best schedule found: valid, executable, and never slower than `serial`.

    The search runs for `iterations` rounds or `budget_s` seconds, whichever ends first (with
    neither, 40 rounds), and stops early at the lower bound. Rounds are deterministic in `seed`, a
    time budget is not. `memory_cap` overrides the problem's. `split_weight` may use I and W.
    Ctrl-C returns the best so far.

    Raises:
        ValueError: the cap holds no schedule (the least that does is named), or deadlines are not
            met by anything found.
    """
    if memory_cap is not None:
        problem = replace(problem, memory_cap=memory_cap)
    if iterations is None and budget_s is None:
        iterations = DEFAULT_ROUNDS
    start = time.monotonic()
    search = _Search(problem, split_weight, seed)
    search.offer(serial(problem))
    if warm_start is not None:
        search.offer(Schedule(problem, warm_start.rows))
    number = 0
    try:
        while search.best > search.bound * (1 + REL_TOL):
            spent = time.monotonic() - start
            if iterations is not None and number >= iterations:
                break
            if budget_s is not None and spent >= budget_s:
                break
            before = search.best
            search.round(number)
            number += 1
            if on_progress is not None and search.best < before:
                spent = time.monotonic() - start
                on_progress(Progress(search.best, search.bound, number, spent))
    except KeyboardInterrupt:
        pass  # the user has seen enough: the best so far is the answer
    return search.answer()


class _Search:
    """One search: the arrays it works on, and the best rows so far."""

    def __init__(self, problem: Problem, split_weight: bool, seed: int) -> None:
        self.problem = problem
        self.coded = encode(problem, [split_weight] * len(problem.pipelines))
        self.cap = NEVER if problem.memory_cap is None else problem.memory_cap * (1 + REL_TOL)
        self.bound = coded_latency_bound(self.coded)
        self.state = np.array([(seed * 2654435761 + 88172645463325252) & (2**47 - 1)], np.int64)
        self.desk = make_desk(self.coded)
        self.ground = _ground(problem, self.coded, split_weight)
        chains = self.coded.base.shape[0]
        self.genes = make_genes(len(problem.pipelines), chains)
        self.trial_genes = make_genes(len(problem.pipelines), chains)
        self.policy = Policy(
            np.zeros(self.coded.rank.shape[0]), np.zeros(chains, np.int64), 0.0, self.cap
        )
        self.channel = channel_numbers(problem, self.coded)
        self.late = _lateness(problem, self.coded, self.bound)
        self.listed = np.inf  # best list schedule
        self.best = np.inf
        self.rows: Rows | None = None  # current point of the local search
        self.bench: Bench | None = None
        self.found: Schedule | None = None

    def offer(self, schedule: Schedule) -> None:
        """Take a schedule that exists already as a starting point, if it is legal."""
        try:
            schedule.validate()
        except ValueError:
            return
        length = makespan(schedule)
        if length < self.best:
            self.best, self.found = length, schedule

    def round(self, number: int) -> None:
        """A batch of list schedules, then a batch of local moves."""
        self._list(1.0 if number == 0 else 0.25)
        if self.rows is None:
            return
        self._improve(number)

    def _list(self, fresh: float) -> None:
        coded, policy = self.coded, self.policy
        length = trials(
            coded,
            self.desk,
            self.ground,
            policy,
            self.genes,
            self.trial_genes,
            self.listed,
            fresh,
            TRIALS,
            self.state,
        )
        if length < self.listed:
            self.listed = length
            express(coded, self.ground, self.genes, policy)
            told = policy._replace(window=float(self.genes.window[0]))
            dispatch(coded, self.desk, told)
            rows = rows_of(self.desk)
            if self.bench is None:
                self.bench = make_bench(coded, rows, self.channel)
            if safe(rows, coded, self.bench, 1):
                settle(rows, coded, self.bench)
                true = measure(rows, coded, self.bench, self.late)
                if true < self.best:
                    self.best = true
                    self.bench.best[:] = rows.tasks
                    self.found = None
                self.rows = rows

    def _improve(self, number: int) -> None:
        assert self.rows is not None
        assert self.bench is not None
        unit = self.ground.unit
        hot = unit * (0.6, 0.3, 0.15)[number % 3]
        best = anneal(
            self.rows,
            self.coded,
            self.bench,
            self.late,
            self.cap,
            self.bound,
            self.best,
            hot,
            hot / 20,
            MOVES,
            self.state,
        )
        if best < self.best:
            self.best, self.found = best, None

    def answer(self) -> Schedule:
        if self.found is None:
            assert self.rows is not None
            assert self.bench is not None
            self.found = decode(self.problem, self.coded, Rows(self.bench.best, self.rows.first))
        self.found.validate()
        return self.found


def _ground(problem: Problem, coded: Coded, split_weight: bool) -> Ground:
    """Each pipeline's own flow, and scales for random numbers."""
    alone, depth, pipeline = [], [], []
    for number, pipe in enumerate(problem.pipelines):
        own = encode(replace(problem, pipelines=(pipe,)), [split_weight])
        desk = make_desk(own)
        limits = np.arange(pipe.num_stages, 0, -1)
        key = own.microbatch + 1e6 * (own.slot == SLOT_F) + 1e7 * (own.slot == SLOT_W)
        dispatch(own, desk, Policy(key.astype(np.float64), limits, 0.0, NEVER))
        alone.append(desk.end - own.duration)
        depth.append(limits)
        pipeline.append(np.full(pipe.num_stages, number))
    real = coded.slot < coded.chain_slots[coded.chain]
    work = np.bincount(coded.rank, coded.duration * real, coded.num_ranks)
    return Ground(
        np.concatenate(alone),
        np.concatenate(pipeline),
        np.concatenate(depth),
        float(coded.duration[real].mean()),
        float(work.max()),
    )


def _lateness(problem: Problem, coded: Coded, bound: float) -> Floats:
    """Tasks of a pipeline with a deadline count as that much longer, relative to the bound."""
    stages = [pipe.num_stages for pipe in problem.pipelines]
    late = [0.0 if p.deadline is None else max(0.0, bound - p.deadline) for p in problem.pipelines]
    return np.repeat(np.asarray(late), stages)[coded.chain]
