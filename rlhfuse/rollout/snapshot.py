"""The running samples and the known scoring at one moment, for a decision."""

from dataclasses import dataclass

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout.fleet import Fleet
from rlhfuse.rollout.forecast import Bools, Floats, Ints, State
from rlhfuse.rollout.groups import TRAIN, Groups
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.scoring import ScoreBoard


@dataclass(frozen=True, slots=True)
class Tail:
    """n samples, by id, on i instances (all of them, or a part that stands for all)."""

    sample_ids: Ints  # [n]
    groups: Ints  # [n]
    tokens: Floats  # [n] response tokens so far, as estimated
    prompts: Floats  # [n]
    home: Ints  # [n]
    alive: Bools  # [i]
    scores: Bools  # [i] its scorer is alive
    busy_s: Floats  # [i] seconds of scoring already given to each worker
    slow: Floats  # [i] seconds of a step over what the cost model says
    loaded: Bools  # [i] holds a scoring model
    backlog_s: float  # scoring and training that no worker has, in scorer seconds
    num_samples: int  # of the iteration
    group_tokens: dict[int, int]  # tokens of finished siblings, where groups are trained
    part: float = 1.0  # of all instances


@dataclass(frozen=True, slots=True)
class Books:
    """What a snapshot is taken of."""

    fleet: Fleet
    board: ScoreBoard
    groups: Groups
    num_samples: int


def snapshot(books: Books, policy: Policy, now_s: float) -> Tail:
    """All running samples now."""
    fleet, workers = books.fleet, books.fleet.workers
    ids, groups, home, prompts, offsets = fleet.columns()
    tokens = np.clip(fleet.steps(now_s)[home] - offsets, 0.0, policy.max_response_tokens - 1.0)
    backlog_s = books.board.pending_s
    group_tokens: dict[int, int] = {}
    if books.groups.train:
        known = books.groups.tokens
        group_tokens = {group: known.get(group, 0) for group in set(groups.tolist())}
        # Of groups that still run, training is foreseen sample by sample; of all others here,
        # whether their scores are there yet or not.
        waiting = books.groups.untrained_tokens - sum(group_tokens.values())
        backlog_s += waiting * books.board.cost.score_token_s[TRAIN]
    return Tail(
        sample_ids=ids,
        groups=groups,
        tokens=tokens,
        prompts=prompts,
        home=home,
        alive=fleet.alive,
        scores=fleet.alive & np.array([w.can_score for w in workers]),
        busy_s=np.array([w.busy_s for w in workers]),
        slow=fleet.slowness(),
        loaded=np.array([bool(w.last_role) for w in workers], dtype=np.bool_),
        backlog_s=backlog_s,
        num_samples=books.num_samples,
        group_tokens=group_tokens,
    )


def thinned(tail: Tail, block: int, most: int) -> Tail:
    """A part of the instances, in whole blocks, with at most about `most` samples, that stands for
    all of them: every so many-th by the samples they hold."""
    num, instances = len(tail.home), len(tail.alive)
    blocks = -(-instances // block)
    stride = -(-num // most)
    if stride < 2 or blocks < 16 * stride:
        stride = min(stride, max(1, blocks // 16))
        if stride < 2:
            return tail
    counts = np.bincount(tail.home // block, minlength=blocks)
    chosen = np.sort(np.argsort(-counts, kind="stable")[stride // 2 :: stride])
    members = (chosen[:, None] * block + np.arange(block)[None, :]).ravel()
    members = members[members < instances]
    number = np.full(instances, -1, dtype=np.int64)
    number[members] = np.arange(len(members))
    mine = np.flatnonzero(number[tail.home] >= 0)
    part = len(members) / instances
    return Tail(
        sample_ids=tail.sample_ids[mine],
        groups=tail.groups[mine],
        tokens=tail.tokens[mine],
        prompts=tail.prompts[mine],
        home=number[tail.home[mine]],
        alive=tail.alive[members],
        scores=tail.scores[members],
        busy_s=tail.busy_s[members],
        slow=tail.slow[members],
        loaded=tail.loaded[members],
        backlog_s=tail.backlog_s * part,
        num_samples=max(1, round(tail.num_samples * part)),
        group_tokens=tail.group_tokens,
        part=part,
    )  # fmt: skip


def takes_cache(context: Floats, cost: CostModel, policy: Policy) -> Bools:
    """Which samples of so many tokens would move with their keys and values: the others are
    prefilled again. [n]"""
    return cost.cache_pays(context) & policy.moves_cache


def state_of(
    tail: Tail, remaining: Floats, roles: tuple[str, ...], train: bool, cost: CostModel,
    policy: Policy, table: Floats,
) -> State:  # fmt: skip
    """The forecast's view of a tail, with `remaining` [m, n] tokens to come."""
    context = tail.prompts + tail.tokens
    rates = [cost.score_token_s[role] for role in roles] or [0.0]
    moved_s = cost.migrate_token_s * context
    prefill_s = cost.prefill_token_s * context
    cached = takes_cache(context, cost, policy)
    blocks = -(-len(tail.alive) // policy.block)
    usable = np.ones(blocks, dtype=np.bool_)
    load_s = np.zeros(blocks)
    np.logical_and.at(usable, np.arange(len(tail.alive)) // policy.block, tail.scores)
    load_s[~tail.loaded[:: policy.block]] = cost.swap_s
    group, group_tokens = np.zeros(len(tail.groups), dtype=np.int64), np.zeros(1)
    if train:
        distinct, number = np.unique(tail.groups, return_inverse=True)
        known = tail.group_tokens
        group = number.astype(np.int64)
        group_tokens = np.array([float(known.get(g, 0)) for g in distinct.tolist()])
    return State(
        remaining=np.ascontiguousarray(remaining),  # one layout, or the forecast compiles again
        order=np.argsort(np.ascontiguousarray(remaining), axis=1),
        context=context,
        home=tail.home,
        busy_s=tail.busy_s,
        slow=tail.slow,
        usable=usable,
        block=policy.block,
        load_s=load_s,
        table=table,
        context_s=cost.decode_context_s,
        stall_s=np.where(cached, moved_s, prefill_s),
        stall_call_s=cost.migrate_call_s + (0.0 if cached.all() else cost.prefill_call_s),
        score_token_s=float(sum(rates)),
        last_token_s=float(max(rates)),
        backlog_s=float(tail.backlog_s),
        group=group,
        group_tokens=group_tokens,
        train_token_s=cost.score_token_s[TRAIN] if train else 0.0,
    )


def whole_iteration(num: int, instances: int, prompt: float) -> Tail:
    """All samples at their start, dealt out in turn."""
    zeros: Floats = np.zeros(instances)
    yes = np.ones(instances, dtype=np.bool_)
    ids = np.arange(num, dtype=np.int64)
    return Tail(
        sample_ids=ids,
        groups=ids,
        tokens=np.zeros(num),
        prompts=np.full(num, prompt),
        home=ids % instances,
        alive=yes,
        scores=yes,
        busy_s=zeros,
        slow=np.ones(instances),
        loaded=~yes,
        backlog_s=0.0,
        num_samples=num,
        group_tokens={},
    )
