"""Should the tail move, which samples, and where to? Pure functions of a snapshot."""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout.forecast import Bools, Floats, Ints, State, end_s
from rlhfuse.rollout.lengths import LengthModel, stratified
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.snapshot import Tail, state_of, takes_cache, thinned

LATER = (0.9, 0.75, 0.55, 0.35, 0.2, 0.1)  # moments to wait for, by part remaining
MOST_SAMPLES = 2048  # that a forecast looks at; of more, a part of the instances stands for all
MOST_SCENARIOS = 12
MOST_TRIED = 3  # plans, from the best on: of what is better by the margin, something may not fit


@dataclass(frozen=True, slots=True)
class Move:
    """`destinations[j]` for the j-th sample of the tail; its home where it stays."""

    destinations: tuple[int, ...]
    text: str
    gain_s: float


@dataclass(frozen=True, slots=True)
class Frame:
    """What does not change during an iteration. `table`: step seconds by batch."""

    lengths: LengthModel
    cost: CostModel
    policy: Policy
    roles: tuple[str, ...]
    train: bool
    table: Floats


def decide(tail: Tail, frame: Frame) -> Move | None:
    """The move to make now, or None: nothing pays by the margin, or a later move pays more."""
    part = thinned(tail, frame.policy.block, MOST_SAMPLES)
    num = len(part.sample_ids)
    if not num:
        return None
    scenarios = max(2, min(MOST_SCENARIOS, 4096 // num))
    remaining = _remaining(part, frame.lengths, scenarios)
    state = _state(part, remaining, frame)
    stay_s = float(end_s(state, np.zeros(len(part.alive), dtype=np.bool_), 0))
    enough_s = (1.0 - frame.policy.margin) * stay_s
    # No move makes the longest sample faster than alone on the fastest instance.
    alone_s = frame.cost.step_s(1) * float(part.slow[part.alive].min())
    if float(remaining.max(axis=1).mean()) * alone_s >= enough_s:
        return None
    blocks = block_order(part, frame.policy.block)
    plans = _weighed(part, state, blocks, num)
    for now_s, size in sorted(plans)[:MOST_TRIED]:
        if now_s >= enough_s or _later_is_better(part, state, blocks, size, now_s):
            return None
        move = _whole(tail, part, size / len(blocks), now_s, stay_s, frame)
        if move is not None:
            return move
    return None


def _weighed(part: Tail, state: State, blocks: list[Ints], num: int) -> list[tuple[float, int]]:
    """(end, blocks that go on): a ladder of sizes, then the sizes between the best and its
    neighbours."""
    ends: dict[int, float] = {}

    def weigh(sizes: list[int]) -> None:
        for size in sizes:
            if size not in ends:
                ends[size] = float(end_s(state, keep_first(part, blocks, size), num))

    ladder = plan_sizes(part, blocks)
    weigh(ladder)
    while ladder:
        best = min(ends, key=lambda size: (ends[size], size))
        known = sorted(ends)
        place = known.index(best)
        near = known[max(0, place - 1) : place + 2]
        middles = [(a + b) // 2 for a, b in pairwise(near)]
        ladder = [m for m, a in zip(middles, near, strict=False) if m != a and 16 * (m - a) > a]
        weigh(ladder)
    return [(end, size) for size, end in ends.items()]


def _later_is_better(part: Tail, state: State, blocks: list[Ints], size: int, now_s: float) -> bool:
    """Whether the same move, or one to fewer blocks, ends sooner if it waits."""
    num = state.remaining.shape[1]
    sizes = sorted({size, max(1, size // 2), max(1, size // 4)}, reverse=True)
    return num > 2 and any(
        end_s(state, keep_first(part, blocks, fewer), max(1, int(when * num))) < now_s
        for fewer in sizes
        for when in LATER
    )


def _remaining(tail: Tail, lengths: LengthModel, scenarios: int) -> Floats:
    quantiles = stratified(scenarios, tail.sample_ids)
    return lengths.remaining(tail.tokens, quantiles, tail.sample_ids, tail.groups)


def _state(tail: Tail, remaining: Floats, frame: Frame) -> State:
    return state_of(
        tail, remaining, frame.roles, frame.train, frame.cost, frame.policy, frame.table
    )


def _whole(
    tail: Tail, part: Tail, share: float, now_s: float, stay_s: float, frame: Frame
) -> Move | None:
    """The plan that was good for a part, for the whole fleet: `share` of its blocks go on."""
    blocks = block_order(tail, frame.policy.block)
    size = max(1, round(share * len(blocks)))
    keep = keep_first(tail, blocks, size)
    expected = _remaining(tail, frame.lengths, 4).mean(axis=0)
    destinations = assign(tail, keep, expected, frame.policy)
    if destinations is None:
        return None
    destinations = _let_finish(tail, destinations, expected, frame)
    moved = np.flatnonzero(np.asarray(destinations) != tail.home)
    if not len(moved):
        return None
    context = (tail.prompts + tail.tokens)[moved]
    cached = int(np.count_nonzero(takes_cache(context, frame.cost, frame.policy)))
    before = len(set((tail.home // frame.policy.block).tolist()))
    text = (
        f"{len(moved)} of {len(tail.home)} running samples move ({cached} with their cache, "
        f"{len(moved) - cached} prefilled again), {before} -> {size} of {len(blocks)} "
        f"{'blocks' if frame.policy.block > 1 else 'instances'} generate, "
        f"{tail.backlog_s:.3g} s of scoring wait: "
        f"end in {now_s:.3f} s instead of {stay_s:.3f} s"
    )
    return Move(destinations, text, stay_s - now_s)


def _let_finish(
    tail: Tail, destinations: tuple[int, ...], expected: Floats, frame: Frame
) -> tuple[int, ...]:
    """Samples that are expected to end sooner than they could leave stay where they are."""
    cost = frame.cost
    counts = np.bincount(tail.home, minlength=len(tail.alive))
    step_s = frame.table[np.minimum(counts, len(frame.table) - 1)] * tail.slow
    context = tail.prompts + tail.tokens
    leave_s = cost.migrate_call_s + np.where(
        takes_cache(context, cost, frame.policy),
        cost.migrate_token_s * context,
        cost.prefill_call_s + cost.prefill_token_s * context,
    )
    stays = expected * step_s[tail.home] < leave_s
    return tuple(np.where(stays, tail.home, np.asarray(destinations)).tolist())


def block_order(tail: Tail, block: int) -> list[Ints]:
    """Blocks whose instances are all alive, those that should go on generating first: the most
    samples and tokens (they need not move), not slow, little scoring given."""
    instances = len(tail.alive)
    counts = np.bincount(tail.home, minlength=instances)
    held = np.bincount(tail.home, tail.prompts + tail.tokens, minlength=instances)
    firsts = np.arange(0, instances, block)
    slow = np.maximum.reduceat(tail.slow, firsts)
    keys = (
        firsts,
        -np.add.reduceat(held, firsts),
        np.maximum.reduceat(tail.busy_s, firsts),
        -np.add.reduceat(counts, firsts),
        np.rint(4 * slow) > 5,  # slower than expected by a third
    )
    usable = np.logical_and.reduceat(tail.alive, firsts)
    return [
        np.arange(first, min(first + block, instances))
        for first in firsts[np.lexsort(keys)].tolist()
        if usable[first // block]
    ]


def plan_sizes(tail: Tail, blocks: list[Ints]) -> list[int]:
    """Numbers of blocks that could go on: fewer than now (consolidation), or more (spreading
    again once scoring has run dry)."""
    busy = np.zeros(len(tail.alive), dtype=np.bool_)
    busy[tail.home] = True
    used = sum(1 for b in blocks if busy[b].any())
    parts = (0.06, 0.12, 0.25, 0.45, 0.7)
    sizes = {1, 2, *(round(p * used) for p in parts)}
    sizes |= {used - 1, used, used + 1, 2 * used, len(blocks)}
    return sorted(s for s in sizes if 0 < s <= len(blocks))


def keep_first(tail: Tail, blocks: list[Ints], size: int) -> Bools:
    keep = np.zeros(len(tail.alive), dtype=np.bool_)
    for block in blocks[:size]:
        keep[block] = True
    return keep


def assign(tail: Tail, keep: Bools, remaining: Floats, policy: Policy) -> tuple[int, ...] | None:
    """Homes after consolidating on `keep`, longest first to the emptiest; None where it cannot
    be promised that everything fits to the end (slots, and cache at the response limit)."""
    home, kept = tail.home, np.flatnonzero(keep)
    most = -(-len(home) // len(kept))
    stays = keep[home] & (_place_at_home(home) < most)
    count = np.bincount(home[stays], minlength=len(keep))
    moving = np.flatnonzero(~stays)
    moving = moving[np.argsort(-remaining[moving], kind="stable")]
    new = home.copy()
    new[moving] = _slots(count, kept, len(moving))
    number = np.bincount(new, minlength=len(keep))
    held = np.bincount(new, tail.prompts + policy.max_response_tokens, minlength=len(keep))
    receives = np.bincount(new[moving], minlength=len(keep)) > 0
    over = number > policy.max_running
    if policy.cache_tokens:
        over |= held > policy.cache_tokens
    return None if bool((receives & over).any()) else tuple(new.tolist())


def _place_at_home(home: Ints) -> Ints:
    """The how-manieth of its home's samples each one is. [n]"""
    order = np.argsort(home, kind="stable")
    counts = np.bincount(home)
    first = np.cumsum(counts) - counts
    place = np.empty(len(home), dtype=np.int64)
    place[order] = np.arange(len(home)) - first[home[order]]
    return place


def _slots(count: Ints, kept: Ints, number: int) -> Ints:
    """The homes that `number` samples get in turn, each the emptiest kept one, the first of
    equals: every kept home offers its next places, and the lowest are taken."""
    held = count[kept]
    # Filled to one level, the `i` emptiest have so much room below the next one.
    level = np.sort(held)
    room = level * np.arange(len(level)) - (np.cumsum(level) - level)
    filled = int(np.searchsorted(room, number, side="left"))
    top = int(level[:filled].sum() + number) // max(filled, 1) + 1
    offers = np.maximum(top - held, 0)
    homes = np.repeat(kept, offers)
    start = np.repeat(np.cumsum(offers) - offers, offers)
    depth = np.repeat(held, offers) + np.arange(len(homes)) - start
    return np.asarray(homes[np.lexsort((homes, depth))[:number]], dtype=np.int64)
