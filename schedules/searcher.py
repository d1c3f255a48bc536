"""One search for a schedule: list schedules and local moves in turn, from round to round."""

from dataclasses import replace

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
    draw,
    encode,
    encode_rows,
)
from rlhfuse.schedules.descents import Descents
from rlhfuse.schedules.dispatch import NEVER, Policy, dispatch, make_desk
from rlhfuse.schedules.flows import AFTER, EARLIEST, make_flow
from rlhfuse.schedules.ir import REL_TOL, Op, Pipeline, Problem, Schedule
from rlhfuse.schedules.local import anneal
from rlhfuse.schedules.paths import complete, make_bench, measure, safe, settle
from rlhfuse.schedules.search import Ground, climbs, make_elite, make_policy
from rlhfuse.schedules.standard import serial, serial_makespan, zb_h1
from rlhfuse.schedules.timing import channel_numbers, check_channels, makespan

CLIMB_TASKS = 6_000  # tasks that the climbs of one round place in one pass, all together
MOVE_TASKS = 1_000_000  # local moves of one round times tasks of the problem
FIRST_CYCLE, NEW_CYCLE, LONGEST_CYCLE = 2, 16, 64  # rounds
CLIMB_SHARE = 8  # one round in so many of a cycle climbs, at least one
STALE_CYCLES = 2  # without improvement, before a new era
TURNS = 4  # one round in so many is of whatever did not find the best
HOT = (0.2, 0.8)  # least and highest first temperature, in mean task durations
COLD = (0.1, 0.5)  # the last temperature, as a share of the first


class Search:
    """The arrays that a search works on, and the best rows so far.

    Rounds are short, so that budgets are kept. They form cycles of 2, 4, 8, ... rounds: a few
    climb by list schedules (see `search`), the others anneal what these found (see `local`); the
    next cycle climbs from there. After some cycles without improvement a new era begins, in
    turn from nothing and from the best rows so far. From the second era on, descents from fresh
    list schedules (see `descents`) take turns with the cycles: which of the two found the best
    gets three rounds of four.
    """

    def __init__(self, problem: Problem, split_weight: bool, seed: int) -> None:
        self.problem = problem
        self.coded = encode(problem, [split_weight] * len(problem.pipelines))
        self.cap = NEVER if problem.memory_cap is None else problem.memory_cap * (1 + REL_TOL)
        self.bound = coded_latency_bound(self.coded)
        self.state = np.array([(seed * 2654435761 + 88172645463325252) & (2**47 - 1)], np.int64)
        self.deadline = _deadlines(problem, self.coded)
        real = self.coded.slot < self.coded.chain_slots[self.coded.chain]
        self.due = np.flatnonzero(real & (self.deadline < np.inf))
        # Until something is on time, lateness counts from a makespan that is easy to reach.
        easy = serial_makespan(replace(problem, memory_cap=None)) if self.due.size else 0.0
        self.late = np.maximum(0.0, easy - self.deadline)
        self.ground = _ground(problem, self.coded, self.late, self.bound)
        self.desk = make_desk(self.coded, self.ground.forward)
        self.policy = make_policy(self.coded, self.cap)
        self.elite = make_elite(self.desk)
        self.rows = Rows(self.desk.tasks.copy(), self.desk.row_first)  # where the annealing stands
        channel = channel_numbers(problem, self.coded)
        self.bench = make_bench(self.coded, self.rows, channel, self.due)
        self.descents = Descents(
            self.coded, self.ground, self.desk, self.policy, self.bench, self.late, self.state
        )
        self.turn, self.descents_lead = 0, False
        self.best = np.inf  # makespan of the best schedule that keeps all deadlines
        self.best_tasks = self.desk.tasks.copy()
        self.found: Schedule | None = None  # the best, where it did not come from the search
        self.start = np.inf  # length of the elite when the cycle began
        self.step, self.length, self.stale, self.era = 0, FIRST_CYCLE, 0, 0
        self.hot = self.cold = 1.0  # temperatures of this cycle

    def begin(self, split_weight: bool, warm_start: Schedule | None) -> None:
        """Take what needs no search.

        Raises:
            ValueError: the memory cap does not even hold one micro-batch.
        """
        problem = self.problem
        self.offer(serial(problem))
        if split_weight:
            self.offer(zb_h1(problem))
        if self.due.size:
            self.offer(Schedule(problem, serial(_most_urgent_first(problem)).rows))
        if warm_start is not None:
            rows = self.offer(Schedule(problem, warm_start.rows))
            if rows is not None:
                self._learn(rows.tasks)

    def offer(self, schedule: Schedule) -> Rows | None:
        """Take a schedule that exists already, if it is legal; its rows as the search sees them."""
        try:
            rows = _rows_with_split(schedule, self.coded)
        except (KeyError, IndexError):
            return None  # of another problem
        if self._visit(rows):
            return rows
        try:  # with whole backwards it may fit where I and W do not
            schedule.validate()
            check_channels(schedule)
        except ValueError:
            return None
        length = makespan(schedule)
        if length < self.best:
            self.best, self.found = length, schedule
        return None

    def round(self) -> None:
        """A part of a cycle or, from the second era on, of a descent in turn with it."""
        self.turn += 1
        if self.era > 0 and (self.turn % TURNS == 0) != self.descents_lead:
            self._descend()
        else:
            self._go_on()

    def _descend(self) -> None:
        """A part of a descent; cycles go on from what it finds."""
        best = self.best
        base = self.best_tasks if best < np.inf and self.found is None else None
        tasks = self.descents.round(best, base, self._count_climbs(), self._count_moves())
        if tasks is not None and self._visit(Rows(tasks, self.rows.first)) and self.best < best:
            self._learn(tasks)
            self.descents_lead = True

    def _go_on(self) -> None:
        """Some climbs at the beginning of a cycle, then some local moves."""
        best = self.best
        if self.step == 0:
            self._retune()
            self.start = float(self.elite.length[0])
        climbs = self._num_climbs()
        if self.step < climbs:
            self._climb()
        else:
            if self.step == climbs:
                self.rows.tasks[:] = self._base()
                self.bench.best[:] = self.rows.tasks
                self._heat()
            self._anneal()
        if self.best < best:
            self.descents_lead = False
        self.step += 1
        if self.step >= self.length:
            self._next_cycle()

    def _count_climbs(self) -> int:
        return int(max(1, CLIMB_TASKS // self.desk.tasks.shape[0]))

    def _count_moves(self) -> int:
        return int(np.clip(MOVE_TASKS // self.rows.tasks.shape[0], 200, 3000))

    def _num_climbs(self) -> int:
        """Rounds of the cycle that climb."""
        return max(1, self.length // CLIMB_SHARE)

    def _base(self) -> Ints:
        """Where annealing starts: the elite, or what is known without a search."""
        return self.elite.tasks if self.elite.length[0] < np.inf else self.best_tasks

    def _climb(self) -> None:
        before = float(self.elite.length[0])
        tasks, start = self.elite.tasks.copy(), self.elite.start.copy()
        count = self._count_climbs()
        climbs(self.coded, self.ground, self.desk, self.policy, self.elite, count, self.state)
        if self.elite.length[0] < before and not self._visit(
            Rows(self.elite.tasks.copy(), self.rows.first)
        ):  # streams that share a channel may get stuck: back to what is known to run
            self.elite.length[0] = before
            self.elite.tasks[:], self.elite.start[:] = tasks, start

    def _heat(self) -> None:
        """Draw the temperatures of a cycle."""
        self.hot = self.ground.unit * HOT[0] * (HOT[1] / HOT[0]) ** draw(self.state)
        self.cold = self.hot * (COLD[0] + (COLD[1] - COLD[0]) * draw(self.state))

    def _anneal(self) -> None:
        climbs = self._num_climbs()
        turns = self.length - climbs
        cooling = (self.cold / self.hot) ** (1 / turns)
        hot = self.hot * cooling ** (self.step - climbs)
        moves = self._count_moves()
        before = float(self.elite.length[0])
        length = anneal(
            self.rows,
            self.coded,
            self.bench,
            self.late,
            self.cap,
            self.bound,
            before,
            hot,
            hot * cooling,
            moves,
            self.state,
        )
        if length < before:
            tasks = self.bench.best.copy()
            self._visit(Rows(tasks, self.rows.first))
            self._learn(tasks)

    def _learn(self, tasks: Ints) -> None:
        """Climbs start from these rows from now on."""
        rows = Rows(tasks, self.rows.first)
        settle(rows, self.coded, self.bench)
        length = measure(rows, self.coded, self.bench, self.late)
        if length >= 0.0:
            self.elite.length[0] = length
            self.elite.start[:] = self.bench.end - self.coded.duration
            self.elite.tasks[:] = tasks

    def _next_cycle(self) -> None:
        improved = self.elite.length[0] < self.start
        self.stale = 0 if improved else self.stale + 1
        self.step, self.length = 0, min(2 * self.length, LONGEST_CYCLE)
        if self.stale >= STALE_CYCLES:
            self.stale, self.length, self.era = 0, NEW_CYCLE, self.era + 1
            self.elite.length[0] = np.inf
            if self.era % 2 == 0 and self.best < np.inf:
                self._learn(self.best_tasks)

    def _retune(self) -> None:
        """Once something is on time, deadlines count from the best makespan.

        Ahead of a makespan M below the best, a deadline d counts as d - (best - M): what beats the
        best is on time.
        """
        if not self.due.size or self.best == np.inf:
            return
        self.late[:] = np.maximum(0.0, self.best - self.deadline)
        self.ground.forward.task[:, AFTER] = self.late
        self.ground.backward.task[:, EARLIEST] = self.late
        self.descents.restart()
        if self.elite.length[0] < np.inf:
            self._learn(self.elite.tasks.copy())

    def _visit(self, rows: Rows) -> bool:
        """Make `rows` the best if they are; whether they are legal, but for deadlines.

        Checks all that `Schedule.validate` and `check_channels` do, compiled.
        """
        sizes = (rows.tasks.shape, rows.first.shape)
        if sizes != (self.rows.tasks.shape, self.rows.first.shape) or not complete(
            rows, self.coded
        ):
            return False
        settle(rows, self.coded, self.bench)
        length = measure(rows, self.coded, self.bench, self.late)
        if length < 0.0 or not safe(rows, self.coded, self.bench, 1) or not self._fits(rows):
            return False
        end = self.bench.end
        on_time = bool(np.all(end[self.due] <= self.deadline[self.due] * (1 + REL_TOL)))
        length = float(end[rows.tasks].max(initial=0.0))
        if self.best == np.inf and not on_time:
            self.best_tasks[:] = rows.tasks  # a place to start from
        if on_time and length < self.best:
            self.best, self.found = length, None
            self.best_tasks[:] = rows.tasks
        return True

    def _fits(self, rows: Rows) -> bool:
        during = self.bench.held + self.coded.claim[rows.tasks]
        after = during + self.coded.change[rows.tasks]
        return bool(np.all(during <= self.cap) and np.all(after <= self.cap))

    def answer(self) -> Schedule:
        """The best schedule; all checks are behind it (see `_visit`)."""
        if self.found is not None:
            return self.found
        if self.best == np.inf:
            raise ValueError(
                f"nothing found fits the memory cap {self.problem.memory_cap} and all deadlines; "
                "raise the cap or a deadline"
            )
        return decode(self.problem, self.coded, Rows(self.best_tasks, self.rows.first))


def _most_urgent_first(problem: Problem) -> Problem:
    def urgency(pipe: Pipeline) -> float:
        return np.inf if pipe.deadline is None else pipe.deadline

    return replace(problem, pipelines=tuple(sorted(problem.pipelines, key=urgency)))


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


def _ground(problem: Problem, coded: Coded, late: Floats, bound: float) -> Ground:
    """The flows of the problem, each pipeline's own flow, and scales for random numbers."""
    alone, depth, pipeline = [], [], []
    split = bool((coded.chain_slots > SLOT_W).any())
    for number, pipe in enumerate(problem.pipelines):
        own = encode(replace(problem, pipelines=(pipe,)), [split])
        flow = make_flow(problem, own, np.zeros(own.rank.shape[0]), reverse=False)
        desk = make_desk(own, flow)
        limits = np.arange(pipe.num_stages, 0, -1)
        key = own.microbatch + 1e6 * (own.slot == SLOT_F) + 1e7 * (own.slot == SLOT_W)
        dispatch(flow, desk, Policy(key.astype(np.float64), limits, 0 * limits, 0.0, False, NEVER))
        alone.append(desk.end - own.duration)
        depth.append(limits)
        pipeline.append(np.full(pipe.num_stages, number))
    real = coded.slot < coded.chain_slots[coded.chain]
    work = np.bincount(coded.rank, coded.duration * real, coded.num_ranks)
    return Ground(
        make_flow(problem, coded, late, reverse=False),
        make_flow(problem, coded, late, reverse=True),
        np.concatenate(alone),
        np.concatenate(pipeline),
        len(problem.pipelines),
        np.concatenate(depth),
        float(coded.duration[real].mean()),
        float(work.max()),
        bound * (1 + REL_TOL),
    )


def _deadlines(problem: Problem, coded: Coded) -> Floats:
    """Latest end of each task [T], infinite where there is no deadline."""
    stages = [pipe.num_stages for pipe in problem.pipelines]
    by_pipeline = [np.inf if p.deadline is None else p.deadline for p in problem.pipelines]
    return np.repeat(np.asarray(by_pipeline, np.float64), stages)[coded.chain]
