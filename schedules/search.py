"""Search by list scheduling, forwards and backwards in turn.

The start times of a schedule, counted from its end, are the keys of a list schedule made against
time; that one's start times are the keys of the next made in time's direction, and so on (forward-
backward improvement, Li and Willis 1992, Tormos and Lova 2001, for project scheduling). A climb
goes on while this helps. It starts from keys drawn at random around the times that each pipeline
has when it runs alone, or from the best schedule's times, shaken.
"""

from typing import NamedTuple

import numpy as np

from rlhfuse.schedules.compiled import SLOT_F, SLOT_W, Coded, Floats, Ints, compiled, draw
from rlhfuse.schedules.dispatch import NO_LIMIT, Desk, Policy, dispatch
from rlhfuse.schedules.flows import COUNT, DURATION, FIRST, Flow

PATIENCE = 3  # passes of a climb that bring nothing
FRESH = 0.3  # share of climbs from random keys


class Ground(NamedTuple):
    """The fixed part of a search by list scheduling."""

    forward: Flow
    backward: Flow
    alone: Floats  # [T] start of each task when its pipeline runs alone
    pipeline: Ints  # [C]
    num_pipelines: int
    depth: Ints  # [C] stages from this one to the last, itself included
    unit: float  # a typical task duration
    span: float  # about how long everything takes
    target: float  # a length that needs no improvement


class Elite(NamedTuple):
    """The best schedule of a search: what the next climbs start from."""

    length: Floats  # [1]
    start: Floats  # [T]
    tasks: Ints  # [N] the rows


def make_elite(desk: Desk) -> Elite:
    """No schedule yet."""
    return Elite(np.array([np.inf]), np.zeros(desk.end.shape[0]), np.zeros_like(desk.tasks))


def make_policy(coded: Coded, cap: float) -> Policy:
    """Arrays for keys and limits; all limits open."""
    chains = coded.base.shape[0]
    key, way = np.zeros(coded.rank.shape[0]), np.zeros(chains, np.int64)
    return Policy(key, way + NO_LIMIT, way, 0.0, False, cap)


@compiled
def _random_keys(coded: Coded, ground: Ground, policy: Policy, state: Ints) -> None:
    """Keys around the pipelines' own times, stretched and shifted; limits around 1F1B's."""
    chains, unit, pipelines = coded.base.shape[0], ground.unit, ground.num_pipelines
    stretch, shift, scale = np.empty(pipelines), np.empty(pipelines), np.empty(pipelines)
    more = np.empty(pipelines, np.int64)
    for p in range(pipelines):
        stretch[p] = 0.6 + 1.4 * draw(state)
        shift[p] = (draw(state) - 0.5) * 0.5 * ground.span * draw(state)
        scale[p], more[p] = 0.4 + 1.2 * draw(state), int(draw(state) * 4.0)
        if draw(state) < 0.15:
            more[p] = NO_LIMIT
    spread = draw(state) ** 2 * 6.0 * unit
    forward_later = 20.0 * unit if draw(state) < 0.5 else 0.0
    lean = np.empty((chains, 3))
    for chain in range(chains):
        p = ground.pipeline[chain]
        policy.limit[chain] = int(np.ceil(ground.depth[chain] * scale[p])) + more[p]
        for slot in range(3):
            lean[chain, slot] = shift[p] + (draw(state) - 0.5) * spread
        lean[chain, SLOT_F] += forward_later
        lean[chain, SLOT_W] += draw(state) * ground.span
    for task in range(policy.key.shape[0]):
        chain = coded.chain[task]
        own = ground.alone[task] * stretch[ground.pipeline[chain]]
        policy.key[task] = own + lean[chain, coded.slot[task]]


@compiled
def _shaken_keys(ground: Ground, policy: Policy, elite: Elite, state: Ints) -> None:
    """The times of the best schedule, with all tasks, some kinds or a stretch of time shaken."""
    size = ground.unit * (0.3, 1.0, 2.0, 4.0)[int(draw(state) * 4.0)]
    how, length = int(draw(state) * 3.0), elite.length[0]
    share = (0.1, 0.3, 1.0)[int(draw(state) * 3.0)]
    begin = draw(state) * length
    end = begin + length * (0.05, 0.15, 0.3)[int(draw(state) * 3.0)]
    kind = ground.forward.kind
    policy.limit[:] = NO_LIMIT
    for k in range(kind.shape[0]):
        shift = 0.0
        if how == 1 and draw(state) < share:
            shift = (2.0 * draw(state) - 1.0) * size
        for task in range(kind[k, FIRST], kind[k, FIRST] + kind[k, COUNT]):
            start = elite.start[task]
            if how == 0 or (how == 2 and begin < start < end):
                shift = (2.0 * draw(state) - 1.0) * size * max(1.0, how)
            elif how == 2:
                shift = 0.0
            policy.key[task] = start + shift


@compiled
def _follow(ground: Ground, desk: Desk, key: Floats, length: float, noise: float, st: Ints) -> None:
    """Keys for the next pass: time from a task's end to the end of all, a little shaken."""
    kind = ground.forward.kind
    for k in range(kind.shape[0]):
        shift = (draw(st) - 0.5) * noise if noise > 0.0 else 0.0
        for task in range(kind[k, FIRST], kind[k, FIRST] + kind[k, COUNT]):
            key[task] = length - desk.end[task] + shift


@compiled
def _climb(
    ground: Ground, desk: Desk, policy: Policy, elite: Elite, noise: float, state: Ints
) -> None:
    """List schedules in both directions in turn while they help."""
    shortest, stale, forwards = np.inf, 0, True
    while stale < PATIENCE:
        flow = ground.forward if forwards else ground.backward
        length = dispatch(flow, desk, policy)
        if length == np.inf:
            return
        policy.limit[:] = NO_LIMIT
        stale += 1
        if length < shortest - 1e-9:
            shortest, stale = length, 0
        if length < elite.length[0] - 1e-9:
            elite.length[0] = length
            elite.tasks[:] = desk.tasks
            for task in range(desk.end.shape[0]):
                end = desk.end[task]
                duration = flow.task[task, DURATION]
                elite.start[task] = end - duration if forwards else length - end
            if length <= ground.target:
                return
        _follow(ground, desk, policy.key, length, noise, state)
        forwards = not forwards


@compiled
def climbs(
    coded: Coded, ground: Ground, desk: Desk, policy: Policy, elite: Elite, count: int, state: Ints
) -> None:
    """Run `count` climbs; what they find better than `elite` replaces it."""
    for _ in range(count):
        noise = window = 0.0
        if draw(state) < FRESH or elite.length[0] == np.inf:
            _random_keys(coded, ground, policy, state)
            if draw(state) < 0.5:
                window = ground.unit * draw(state)
        else:
            _shaken_keys(ground, policy, elite, state)
            noise = ground.unit if draw(state) < 0.33 else 0.0
            window = 0.5 * ground.unit if draw(state) < 0.33 else 0.0
        turn = draw(state) * 3.0
        for chain in range(policy.way.shape[0]):
            p = ground.pipeline[chain]
            policy.way[chain] = 0 if turn < 1.0 else p if turn < 2.0 else -p
        bold = draw(state) < 0.6
        told = Policy(policy.key, policy.limit, policy.way, window, bold, policy.cap)
        _climb(ground, desk, told, elite, noise, state)
        if elite.length[0] <= ground.target:
            return
