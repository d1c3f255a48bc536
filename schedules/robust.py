"""Schedules under noisy durations: how much one loses, and a search for one that loses little.

Noise is a factor on every task's duration, drawn independently from a log-normal distribution of
mean 1. Row orders are kept, as in a run: a late task delays what waits for it.
"""

from dataclasses import dataclass
from itertools import pairwise
from time import monotonic

import numpy as np

from rlhfuse.schedules.compiled import (
    Bools,
    Coded,
    Floats,
    Ints,
    Rows,
    compiled,
    encode_schedule,
)
from rlhfuse.schedules.fused import DEFAULT_ROUNDS, fuse
from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.timing import channel_numbers, end_times, stuck_ranks

MOVES_PER_ROUND = 20


@dataclass(frozen=True, slots=True)
class NoiseLoss:
    """Makespans of one schedule under noise, in the problem's time unit.

    `loss` is how much longer than planned it takes on average: 0.02 is two percent.
    """

    noise: float
    samples: int
    planned: float
    mean: float
    p95: float

    @property
    def loss(self) -> float:
        return self.mean / self.planned - 1.0 if self.planned > 0 else 0.0


def noise_loss(
    schedule: Schedule, noise: float = 0.1, *, samples: int = 200, seed: int = 0
) -> NoiseLoss:
    """What `schedule` takes when durations vary by a standard deviation of `noise` (a share).

    Raises:
        ValueError: a negative or infinite noise, no samples, or tasks that wait in a circle.
    """
    coded, rows = encode_schedule(schedule)
    end, order = end_times(coded, rows)
    lengths = _makespans(order, _before(rows, coded), coded, noise, samples, seed)
    planned = float(end[rows.tasks].max(initial=0.0))
    return NoiseLoss(
        noise, samples, planned, float(lengths.mean()), float(np.quantile(lengths, 0.95))
    )


def fuse_robust(
    problem: Problem,
    *,
    noise: float = 0.1,
    samples: int = 32,
    budget_s: float | None = None,
    iterations: int | None = None,
    seed: int = 0,
    split_weight: bool = False,
    candidates: int = 3,
) -> Schedule:
    """A schedule whose expected makespan under noise is small: valid, executable, within the cap.

    Half of the budget finds candidates with `fuse`, of different seeds; the one that is best on
    average over `samples` drawn durations is then improved, swap by swap on the critical path of a
    random sample, measured on the same samples. Deterministic in `seed` with `iterations`.

    Raises:
        ValueError: as `fuse`, and a negative or infinite noise.
    """
    if iterations is None and budget_s is None:
        iterations = DEFAULT_ROUNDS
    start = monotonic()
    found = [
        fuse(
            problem,
            budget_s=None if budget_s is None else budget_s / (2 * candidates),
            iterations=None if iterations is None else max(1, iterations // (2 * candidates)),
            seed=seed + number,
            split_weight=split_weight,
        )
        for number in range(candidates)
    ]
    best = min(found, key=lambda s: noise_loss(s, noise, samples=samples, seed=seed).mean)
    climb = _Climb(best, noise, samples, seed)
    moves = 0
    while iterations is None or moves < iterations * MOVES_PER_ROUND:
        if budget_s is not None and monotonic() - start >= budget_s:
            break
        climb.move()
        moves += 1
    return climb.answer()


class _Climb:
    """Swaps of neighbours, kept when the mean makespan over the samples gets no longer."""

    def __init__(self, schedule: Schedule, noise: float, samples: int, seed: int) -> None:
        self.schedule, self.problem = schedule, schedule.problem
        self.coded, self.rows = encode_schedule(schedule)
        self.channel = channel_numbers(self.problem, self.coded)
        self.factors = _factors(self.coded.rank.shape[0], noise, samples, seed)
        self.random = np.random.default_rng(seed)
        self.order = end_times(self.coded, self.rows)[1]
        self.mean = float(self._lengths().mean())
        cap = self.problem.memory_cap
        self.cap = np.inf if cap is None else cap * (1 + REL_TOL)
        due = [np.inf if p.deadline is None else p.deadline for p in self.problem.pipelines]
        stages = [pipe.num_stages for pipe in self.problem.pipelines]
        self.deadline = np.repeat(np.asarray(due), stages)[self.coded.chain] * (1 + REL_TOL)

    def _lengths(self) -> Floats:
        coded, before = self.coded, _before(self.rows, self.coded)
        return _sampled(
            self.order,
            before,
            coded.pred,
            coded.latency,
            coded.release,
            coded.duration,
            self.factors,
        )

    def move(self) -> None:
        """Try one swap."""
        factor = self.factors[self.random.integers(self.factors.shape[0])]
        pairs = _critical_pairs(self.order, _before(self.rows, self.coded), self.coded, factor)
        if pairs.size == 0:
            return
        at = self._position(int(pairs[self.random.integers(pairs.size)]))
        old_order = self.order
        self._swap(at)
        if self._legal():
            mean = float(self._lengths().mean())
            if mean <= self.mean:
                self.mean = mean
                return
        self._swap(at)
        self.order = old_order

    def _position(self, task: int) -> int:
        rank = int(self.coded.rank[task])
        first, last = self.rows.first[rank], self.rows.first[rank + 1]
        return int(first + np.flatnonzero(self.rows.tasks[first:last] == task)[0])

    def _swap(self, at: int) -> None:
        tasks = self.rows.tasks
        tasks[at], tasks[at + 1] = tasks[at + 1], tasks[at]

    def _legal(self) -> bool:
        """Keeps orders, cap, deadlines and the channel rule; sets `order` to the new rows'."""
        try:
            end, self.order = end_times(self.coded, self.rows)
        except ValueError:
            return False
        mine = self.rows.tasks
        if np.any(end[mine] > self.deadline[mine]) or self._peak() > self.cap:
            return False
        stuck = stuck_ranks(self.coded, self.rows, self.channel, 1)
        return bool(np.all(stuck == self.rows.first[1:]))

    def _peak(self) -> float:
        tasks, first = self.rows.tasks, self.rows.first
        step = self.coded.claim[tasks] + self.coded.change[tasks]
        after = np.cumsum(step)
        after -= np.repeat(np.concatenate([[0.0], after])[first[:-1]], np.diff(first))
        return float(np.maximum(after, after - self.coded.change[tasks]).max(initial=0.0))

    def answer(self) -> Schedule:
        """The best schedule, validated."""
        old = encode_schedule(self.schedule)[1].tasks.tolist()
        task = dict(zip(old, (t for _, _, t in self.schedule.tasks()), strict=True))
        ids = [task[id_] for id_ in self.rows.tasks.tolist()]
        rows = tuple(tuple(ids[a:b]) for a, b in pairwise(self.rows.first.tolist()))
        found = Schedule(self.problem, rows)
        found.validate()
        return found


def _factors(size: int, noise: float, samples: int, seed: int) -> Floats:
    """Log-normal factors [samples, size] of mean 1 and standard deviation `noise`."""
    if not 0 <= noise < np.inf or samples < 1:
        raise ValueError(
            f"noise is {noise} with {samples} samples, expected a share of at least 0 and samples"
        )
    sigma = np.sqrt(np.log1p(noise**2))
    normal = np.random.default_rng(seed).standard_normal((samples, size))
    return np.asarray(np.exp(sigma * normal - sigma**2 / 2))


def _before(rows: Rows, coded: Coded) -> Ints:
    """The task before each task [T] on its rank, -1 for the first."""
    before = np.full(coded.rank.shape[0], -1, np.int64)
    before[rows.tasks[1:]] = rows.tasks[:-1]
    starts = rows.first[:-1][np.diff(rows.first) > 0]
    before[rows.tasks[starts]] = -1
    return before


def _makespans(
    order: Ints, before: Ints, coded: Coded, noise: float, samples: int, seed: int
) -> Floats:
    factors = _factors(coded.rank.shape[0], noise, samples, seed)
    return _sampled(
        order, before, coded.pred, coded.latency, coded.release, coded.duration, factors
    )


@compiled
def _sampled(
    order: Ints,
    before: Ints,
    pred: Ints,
    latency: Floats,
    release: Floats,
    duration: Floats,
    factors: Floats,
) -> Floats:
    """Makespan of each sample; `order` has every task after what it waits for."""
    lengths = np.zeros(factors.shape[0])
    end = np.zeros(duration.shape[0])
    for sample in range(factors.shape[0]):
        for i in range(order.shape[0]):
            task = order[i]
            start = release[task]
            if before[task] >= 0:
                start = max(start, end[before[task]])
            if pred[task] >= 0:
                start = max(start, end[pred[task]] + latency[task])
            end[task] = start + duration[task] * factors[sample, task]
            lengths[sample] = max(lengths[sample], end[task])
    return lengths


def _critical_pairs(order: Ints, before: Ints, coded: Coded, factor: Floats) -> Ints:
    """First tasks of the pairs of neighbours on a critical path, under these factors."""
    found = np.zeros(order.shape[0], np.int64)
    count = _walk_back(
        order,
        before,
        coded.pred,
        coded.latency,
        coded.release,
        coded.duration * factor,
        coded.kind,
        coded.needs,
        found,
        np.zeros(coded.rank.shape[0], np.bool_),
    )
    return found[:count]


@compiled
def _walk_back(
    order: Ints,
    before: Ints,
    pred: Ints,
    latency: Floats,
    release: Floats,
    duration: Floats,
    kind: Ints,
    needs: Ints,
    found: Ints,
    tight: Bools,
) -> int:
    """Fill `found`; `tight` [T] is scratch: whether a task started right after the one before."""
    end = np.zeros(duration.shape[0])
    last = order[0]
    for i in range(order.shape[0]):
        task = order[i]
        start = release[task]
        if pred[task] >= 0:
            start = max(start, end[pred[task]] + latency[task])
        tight[task] = before[task] >= 0 and end[before[task]] >= start
        if tight[task]:
            start = end[before[task]]
        end[task] = start + duration[task]
        if end[task] > end[last]:
            last = task
    count = 0
    while last >= 0:
        if tight[last]:
            if kind[before[last]] != kind[last] and needs[last] != before[last]:
                found[count] = before[last]
                count += 1
            last = before[last]
        else:
            last = pred[last]
    return count
