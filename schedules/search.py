"""Random-priority list scheduling, improved by mutation: the first half of the search.

Keys follow the start times that each pipeline has when it runs alone (so that micro-batches flow),
shifted and stretched per pipeline and per kind of task by random amounts. What worked is mutated.
"""

from typing import NamedTuple

import numpy as np

from rlhfuse.schedules.compiled import SLOT_F, SLOT_W, Coded, Floats, Ints, compiled
from rlhfuse.schedules.dispatch import Desk, Policy, dispatch
from rlhfuse.schedules.local import draw


class Genes(NamedTuple):
    """What is searched. Lengths: P pipelines, C chains."""

    stretch: Floats  # [P] scale of a pipeline's own times
    shift: Floats  # [P] added to them
    lean: Floats  # [C, 3] added per chain and slot
    limit: Ints  # [C] micro-batches in flight
    window: Floats  # [1]


class Ground(NamedTuple):
    """The fixed part of a search by list scheduling."""

    alone: Floats  # [T] start of each task when its pipeline runs alone
    pipeline: Ints  # [C]
    depth: Ints  # [C] stages from this one to the last, itself included
    unit: float  # a typical task duration
    span: float  # about how long everything takes


def make_genes(num_pipelines: int, num_chains: int) -> Genes:
    return Genes(
        np.ones(num_pipelines),
        np.zeros(num_pipelines),
        np.zeros((num_chains, 3)),
        np.zeros(num_chains, np.int64),
        np.zeros(1),
    )


@compiled
def _random_genes(genes: Genes, ground: Ground, state: Ints) -> None:
    """Draw everything anew."""
    spread = draw(state) ** 2 * 6.0 * ground.unit
    for p in range(genes.stretch.shape[0]):
        genes.stretch[p] = 0.6 + 1.4 * draw(state)
        genes.shift[p] = (draw(state) - 0.5) * 0.5 * ground.span * draw(state)
        scale, more = 0.4 + 1.2 * draw(state), int(draw(state) * 4.0)
        open_end = draw(state) < 0.15
        for chain in range(genes.limit.shape[0]):
            if ground.pipeline[chain] == p:
                limit = int(np.ceil(ground.depth[chain] * scale)) + more
                genes.limit[chain] = 1 << 30 if open_end else limit
    by_slot = draw(state) < 0.5
    for chain in range(genes.lean.shape[0]):
        for slot in range(3):
            genes.lean[chain, slot] = (draw(state) - 0.5) * spread
            if slot == SLOT_F and by_slot:
                genes.lean[chain, slot] += 20.0 * ground.unit
            if slot == SLOT_W:
                genes.lean[chain, slot] += draw(state) * ground.span
    genes.window[0] = ground.unit * (draw(state) if draw(state) < 0.5 else 0.0)


@compiled
def _mutate(genes: Genes, ground: Ground, state: Ints) -> None:
    """Change a few genes."""
    p = int(draw(state) * genes.stretch.shape[0])
    what = draw(state)
    if what < 0.15:
        genes.stretch[p] *= 0.8 + 0.4 * draw(state)
    elif what < 0.35:
        genes.shift[p] += (draw(state) - 0.5) * 8.0 * ground.unit
    elif what < 0.4:
        genes.window[0] = ground.unit * draw(state) * draw(state)
    share = draw(state) * draw(state) * 0.5
    for chain in range(genes.limit.shape[0]):
        if draw(state) < share and what > 0.2:
            limit = min(genes.limit[chain], 2 * ground.depth[chain] + 4)
            genes.limit[chain] = max(1, limit + int(draw(state) * 3.0) - 1)
    if what < 0.4:
        return
    size = draw(state) * 4.0 * ground.unit
    for chain in range(genes.lean.shape[0]):
        for slot in range(3):
            if draw(state) < share:
                genes.lean[chain, slot] += (draw(state) - 0.5) * size


@compiled
def express(coded: Coded, ground: Ground, genes: Genes, policy: Policy) -> None:
    """Turn genes into keys and limits."""
    for task in range(coded.rank.shape[0]):
        chain = coded.chain[task]
        p = ground.pipeline[chain]
        key = ground.alone[task] * genes.stretch[p] + genes.shift[p]
        policy.key[task] = key + genes.lean[chain, coded.slot[task]]
    for chain in range(coded.base.shape[0]):
        policy.limit[chain] = max(1, genes.limit[chain])


@compiled
def _copy(source: Genes, target: Genes) -> None:
    target.stretch[:] = source.stretch
    target.shift[:] = source.shift
    target.lean[:] = source.lean
    target.limit[:] = source.limit
    target.window[:] = source.window


@compiled
def trials(
    coded: Coded,
    desk: Desk,
    ground: Ground,
    policy: Policy,
    best_genes: Genes,
    genes: Genes,
    best: float,
    fresh: float,
    count: int,
    state: Ints,
) -> float:
    """Run `count` list schedules; the best makespan, its genes in `best_genes`.

    A share `fresh` is drawn anew, the rest mutates the best. Run `dispatch` with the best genes
    once more to have the rows.
    """
    for _ in range(count):
        if draw(state) < fresh or best == np.inf:
            _random_genes(genes, ground, state)
        else:
            _copy(best_genes, genes)
            _mutate(genes, ground, state)
        express(coded, ground, genes, policy)
        told = Policy(policy.key, policy.limit, genes.window[0], policy.cap)
        length = dispatch(coded, desk, told)
        if length <= best:
            best = length
            _copy(genes, best_genes)
    return best
