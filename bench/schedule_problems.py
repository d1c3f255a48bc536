"""Problems that the schedule benchmarks share, and how they are measured."""

import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import numpy as np

from rlhfuse.schedules.compiled import SLOT_F, SLOT_W, Coded, Ints, Rows, decode, encode
from rlhfuse.schedules.dispatch import NEVER, NO_LIMIT, Policy, dispatch, make_desk
from rlhfuse.schedules.flows import make_flow
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import REL_TOL, Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import serial
from rlhfuse.schedules.summary import summarize
from rlhfuse.schedules.timing import check_channels

Row = dict[str, float | int | str]


class PublishedPipeline(msgspec.Struct, frozen=True):
    """One model of a published problem."""

    name: str
    stages: list[int]
    microbatches: int
    forward: float
    backward: float
    activation: float


def flexfusion_problem(
    ranks: int, pipelines: Sequence[PublishedPipeline], cap: float | None
) -> Problem:
    """One of the published problems; the weight gradient is half of the backward."""
    made = tuple(
        Pipeline.make(
            p.name,
            p.stages,
            p.microbatches,
            p.forward,
            p.backward,
            weight=p.backward / 2,
            activation=p.activation,
        )
        for p in pipelines
    )
    return Problem(ranks, made, cap)


def pair(ranks: int, m: int, *, ratio: float = 0.5) -> Problem:
    """Actor and critic in opposite directions; F = I = W, and the critic's are `ratio` of it."""
    actor = Pipeline.make("actor", range(ranks), m, 1, 2, weight=1)
    critic = Pipeline.make(
        "critic", range(ranks)[::-1], m, ratio, 2 * ratio, weight=ratio, activation=ratio
    )
    return Problem(ranks, (actor, critic))


def random_problem(seed: int) -> Problem:
    """Uneven stages, two or more models, sizes that need not divide, links, uneven batches."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 13))
    pipelines = [_random_pipeline("actor", list(range(ranks)), rng, forward_only=False)]
    size = int(rng.integers(1, ranks + 1))
    for copy in range(ranks // size):
        home = list(range(copy * size, (copy + 1) * size))[::-1]
        pipelines.append(_random_pipeline(f"critic{copy}", home, rng, forward_only=False))
    if rng.random() < 0.3:
        home = list(range(ranks))
        pipelines.append(_random_pipeline("reference", home, rng, forward_only=True))
    latency = float(rng.choice([0.0, 0.1]))
    loose = Problem(ranks, tuple(pipelines), None, latency)
    peak = summarize(serial(loose), split_weight=False, seconds=0.0).peak_memory
    return Problem(ranks, tuple(pipelines), 1.2 * peak, latency)


def _random_pipeline(
    name: str, home: list[int], rng: np.random.Generator, *, forward_only: bool
) -> Pipeline:
    m = int(rng.integers(2, 25))
    forward = rng.uniform(0.5, 2.0) * rng.uniform(0.8, 1.2, len(home))
    backward = 0.0 * forward if forward_only else forward * rng.uniform(1.8, 2.2)
    weights = rng.uniform(0.6, 1.4, m) if rng.random() < 0.5 else np.ones(m)
    return Pipeline.make(
        name,
        home,
        m,
        forward.tolist(),
        backward.tolist(),
        weight=(backward / 2).tolist(),
        activation=float(rng.uniform(0.5, 1.5)),
        microbatch_weights=weights.tolist(),
    )


def step_problem(seed: int) -> Problem:
    """What a step may ask: up to 16 ranks and 64 micro-batches a model, uneven stages."""
    rng = np.random.default_rng([seed, 7])
    ranks, m = int(rng.choice([2, 4, 8, 16])), int(rng.integers(4, 65))
    problem = pair(ranks, m, ratio=float(rng.uniform(0.3, 1.0)))
    actor, critic = problem.pipelines
    uneven = [
        replace(
            pipe,
            forward=tuple(f * s for f, s in zip(pipe.forward, scale, strict=True)),
            backward=tuple(b * s for b, s in zip(pipe.backward, scale, strict=True)),
            weight=tuple(w * s for w, s in zip(pipe.weight, scale, strict=True)),
            microbatch_weights=tuple(rng.uniform(0.8, 1.2, m).tolist()),
        )
        for pipe in (actor, critic)
        for scale in [rng.uniform(0.9, 1.3, ranks).tolist()]
    ]
    return Problem(ranks, tuple(uneven), memory_cap=1.5 * ranks + 2)


def greedy(problem: Problem, *, split: bool) -> Schedule:
    """One list schedule: weight last, backward first, oldest first; serial where it gets stuck."""
    coded = encode(problem, [split] * len(problem.pipelines))
    flow = make_flow(problem, coded, np.zeros(coded.rank.shape[0]), reverse=False)
    desk = make_desk(coded, flow)
    key = coded.microbatch + 1e6 * (coded.slot == SLOT_F) + 1e7 * (coded.slot == SLOT_W)
    chains = coded.base.shape[0]
    cap = NEVER if problem.memory_cap is None else problem.memory_cap * (1 + REL_TOL)
    open_ = np.full(chains, NO_LIMIT)
    way = np.zeros(chains, np.int64)
    policy = Policy(key.astype(np.float64), open_, way, 0.0, False, cap)
    if dispatch(flow, desk, policy) == np.inf:
        return serial(problem)  # stuck
    schedule = decode(problem, coded, Rows(desk.tasks, desk.row_first))
    schedule.validate()
    return schedule


def random_orders(problem: Problem, count: int) -> tuple[Coded, Rows, Ints]:
    """`count` different schedules [count, N] by list scheduling with random keys."""
    coded = encode(problem, [False] * len(problem.pipelines))
    flow = make_flow(problem, coded, np.zeros(coded.rank.shape[0]), reverse=False)
    desk = make_desk(coded, flow)
    open_ = np.full(coded.base.shape[0], NO_LIMIT)
    rng = np.random.default_rng(0)
    orders = []
    for _ in range(count):
        key = rng.uniform(size=coded.rank.shape)
        assert dispatch(flow, desk, Policy(key, open_, 0 * open_, 0.0, False, NEVER)) < np.inf
        orders.append(desk.tasks.copy())
    return coded, Rows(desk.tasks, desk.row_first), np.stack(orders)


def measure(problem: Problem, budget_s: float, *, split: bool, seed: int = 0) -> Row:
    """One search of `budget_s` processor seconds, checked; times in the problem's units."""
    start, wall = time.process_time(), time.monotonic()
    reached = [0.0]
    found = fuse(
        problem,
        budget_s=budget_s,
        split_weight=split,
        seed=seed,
        clock=time.process_time,
        on_progress=lambda progress: reached.append(progress.seconds),
    )
    seconds, wall = time.process_time() - start, time.monotonic() - wall
    check_channels(found)
    told = summarize(found, split_weight=split, seconds=seconds)
    return {
        "split": int(split),
        "budget_s": budget_s,
        "cpu_s": round(seconds, 3),
        "wall_s": round(wall, 3),
        "reached_after_s": round(reached[-1], 3),
        "makespan": told.makespan,
        "lower_bound": told.lower_bound,
        "gap": told.makespan / told.lower_bound - 1.0,
        "proven_optimal": int(told.proven_optimal),
        "peak_memory": told.peak_memory,
        "serial_makespan": told.serial_makespan,
    }
