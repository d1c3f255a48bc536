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
    Ints,
    Rows,
    decode,
    encode,
    encode_rows,
)
from rlhfuse.schedules.dispatch import NEVER, Policy, dispatch, make_desk, rows_of
from rlhfuse.schedules.ir import REL_TOL, Op, Pipeline, Problem, Schedule
from rlhfuse.schedules.local import Bench, anneal, make_bench, measure, safe, settle
from rlhfuse.schedules.search import Ground, express, make_genes, trials
from rlhfuse.schedules.standard import serial, serial_makespan, zb_h1
from rlhfuse.schedules.timing import channel_numbers, check_channels, makespan

DEFAULT_ROUNDS = 200
MOVES = 3000  # local moves of one round
LIST_TASKS = 4_000  # tasks that the list schedules of one round place, all together
FIRST_CYCLE, LONGEST_CYCLE = 8, 512  # rounds
HOT, COLD = 0.5, 0.2  # temperatures, in mean task durations


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
    neither, 200 rounds), and stops early at the lower bound. Rounds are deterministic in `seed`, a
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
    search.begin(split_weight, warm_start)
    number = 0
    try:
        while search.best > search.bound * (1 + REL_TOL):
            spent = time.monotonic() - start
            if iterations is not None and number >= iterations:
                break
            if budget_s is not None and spent >= budget_s:
                break
            before = search.best
            search.round()
            number += 1
            if on_progress is not None and search.best < before:
                spent = time.monotonic() - start
                on_progress(Progress(search.best, search.bound, number, spent))
    except KeyboardInterrupt:
        pass  # the user has seen enough: the best so far is the answer
    return search.answer()


def _most_urgent_first(problem: Problem) -> Problem:
    def urgency(pipe: Pipeline) -> float:
        return np.inf if pipe.deadline is None else pipe.deadline

    return replace(problem, pipelines=tuple(sorted(problem.pipelines, key=urgency)))


class _Search:
    """One search: the arrays it works on, and the best rows so far.

    Rounds are short, so that budgets are kept. They form cycles of 8, 16, 32, ... rounds; each
    cycle starts from a new list schedule, the best rows or where the last one stopped, in turn, and
    cools down from `HOT` to `COLD`. List schedules are bred over two cycles, then anew.
    """

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
        self.deadline = _deadlines(problem, self.coded)
        # Until something is on time, lateness counts from a makespan that is easy to reach.
        easy = serial_makespan(replace(problem, memory_cap=None)) if self._due().size else 0.0
        self.late = np.maximum(0.0, easy - self.deadline)
        self.listed = np.inf  # best list schedule of this cycle
        self.best = np.inf
        self.found: Schedule | None = None  # the best, where it did not come from the search
        self.rows: Rows | None = None  # current point of the local search
        self.bench: Bench | None = None
        self.on_time = False  # whether a schedule that keeps all deadlines is known
        self.cycle, self.step, self.length = 0, 0, FIRST_CYCLE

    def begin(self, split_weight: bool, warm_start: Schedule | None) -> None:
        """Take what needs no search.

        Raises:
            ValueError: the memory cap does not even hold one micro-batch.
        """
        problem = self.problem
        self.offer(serial(problem))
        if split_weight:
            self.offer(zb_h1(problem))
        if self._due().size:
            self.offer(Schedule(problem, serial(_most_urgent_first(problem)).rows))
        if warm_start is not None:
            self.offer(Schedule(problem, warm_start.rows))

    def offer(self, schedule: Schedule) -> None:
        """Take a schedule that exists already as a starting point, if it is legal."""
        try:
            schedule.validate()
            check_channels(schedule)
        except ValueError:
            return
        self._visit(_rows_with_split(schedule, self.coded))
        length = makespan(schedule)
        if length < self.best * (1 - 1e-12):
            self.best, self.found = length, schedule

    def round(self) -> None:
        """A few list schedules (in the first third of every third cycle) or local moves."""
        lists = max(1, self.length // 3) if self.cycle % 3 == 0 else 0
        if self.step < lists:
            self._list()
        if self.step == lists - 1 and self.listed < np.inf:
            self._visit(self._listed_rows())
        elif self.step == 0 and self.cycle % 3 == 1 and self.rows is not None:
            assert self.bench is not None
            self.rows.tasks[:] = self.bench.best
        if self.best < np.inf and (self.step == 0 or not self.on_time):
            # Ahead of a makespan M below the best, a deadline d counts as d - (best - M): what
            # beats the best is on time. From the new best on, the deadline is whole again.
            self.late[:] = np.maximum(0.0, self.best - self.deadline)
            self.on_time = True
        if self.step >= lists and self.rows is not None:
            self._improve()
        self.step += 1
        if self.step >= self.length:
            self.cycle, self.step, self.length = self.cycle + 1, 0, 2 * self.length
            self.length = min(self.length, LONGEST_CYCLE)
            self.listed = np.inf if self.cycle % 2 == 0 else self.listed

    def _list(self) -> None:
        """Some list schedules; their best genes stay in `genes`."""
        size = int(self.desk.tasks.size)
        self.listed = trials(
            self.coded,
            self.desk,
            self.ground,
            self.policy,
            self.genes,
            self.trial_genes,
            self.listed,
            0.4,
            max(4, LIST_TASKS // size),
            self.state,
        )

    def _listed_rows(self) -> Rows:
        express(self.coded, self.ground, self.genes, self.policy)
        told = self.policy._replace(window=float(self.genes.window[0]))
        dispatch(self.coded, self.desk, told)
        return rows_of(self.desk)

    def _visit(self, rows: Rows) -> None:
        """Make `rows` the current point, and the best if they are, when they are executable."""
        if self.bench is None:
            channel = channel_numbers(self.problem, self.coded)
            self.bench = make_bench(self.coded, rows, channel, self._due())
        settle(rows, self.coded, self.bench)
        length = measure(rows, self.coded, self.bench, self.late)
        if length < 0.0 or not safe(rows, self.coded, self.bench, 1) or not self._fits(rows):
            return
        self.rows = rows
        due = self.bench.due
        on_time = bool(np.all(self.bench.end[due] <= self.deadline[due] * (1 + REL_TOL)))
        length = float(self.bench.end[rows.tasks].max(initial=0.0))
        if on_time and length < self.best:
            self.best, self.found = length, None
            self.bench.best[:] = rows.tasks

    def _due(self) -> Ints:
        real = self.coded.slot < self.coded.chain_slots[self.coded.chain]
        return np.flatnonzero(real & (self.deadline < np.inf))

    def _fits(self, rows: Rows) -> bool:
        assert self.bench is not None
        during = self.bench.held + self.coded.claim[rows.tasks]
        after = during + self.coded.change[rows.tasks]
        return bool(np.all(during <= self.cap) and np.all(after <= self.cap))

    def _improve(self) -> None:
        assert self.rows is not None
        assert self.bench is not None
        cooling = (COLD / HOT) ** (1 / self.length)
        hot = self.ground.unit * HOT * cooling**self.step
        best = anneal(
            self.rows,
            self.coded,
            self.bench,
            self.late,
            self.cap,
            self.bound,
            self.best,
            hot,
            hot * cooling,
            MOVES,
            self.state,
        )
        if self.best == np.inf:  # nothing is on time yet: is this?
            self._visit(Rows(self.bench.best.copy(), self.rows.first))
        elif best < self.best:
            self.best, self.found = best, None

    def answer(self) -> Schedule:
        """The best schedule, validated."""
        if self.found is None and self.rows is not None and self.best < np.inf:
            assert self.bench is not None
            self.found = decode(self.problem, self.coded, Rows(self.bench.best, self.rows.first))
        if self.found is None:
            raise ValueError(
                f"nothing found fits the memory cap {self.problem.memory_cap} and all deadlines; "
                "raise the cap or a deadline"
            )
        self.found.validate()
        return self.found


def _rows_with_split(schedule: Schedule, coded: Coded) -> Rows:
    """The rows of a schedule; where the search splits, B becomes I followed by W."""
    base = encode_rows(schedule, coded)
    first = [0]
    ids: list[int] = []
    tasks = iter(base.tasks.tolist())
    for row in schedule.rows:
        for task in row:
            id_ = next(tasks)
            ids.append(id_)
            chain = int(coded.chain[id_])
            if task.op is Op.B and coded.chain_slots[chain] > SLOT_W:
                ids.append(id_ + int(coded.num_mb[chain]))
        first.append(len(ids))
    return Rows(np.asarray(ids, np.int64), np.asarray(first, np.int64))


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


def _deadlines(problem: Problem, coded: Coded) -> Floats:
    """Latest end of each task [T], infinite where there is no deadline."""
    stages = [pipe.num_stages for pipe in problem.pipelines]
    by_pipeline = [np.inf if p.deadline is None else p.deadline for p in problem.pipelines]
    return np.repeat(np.asarray(by_pipeline, np.float64), stages)[coded.chain]
