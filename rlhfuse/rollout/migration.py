"""Should the tail move, which samples, and where to? Pure functions of a snapshot."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout.forecast import Bools, Floats, Ints, end_s
from rlhfuse.rollout.lengths import LengthModel, stratified
from rlhfuse.rollout.policy import Policy

LATER = (0.9, 0.75, 0.55, 0.35, 0.2, 0.1)  # moments to wait for, by part remaining


@dataclass(frozen=True, slots=True)
class Tail:
    """Running samples and the scoring that is known, at one moment. n samples, i instances."""

    sample_ids: Ints  # [n]
    tokens: Floats  # [n] response tokens so far
    prompts: Floats  # [n]
    home: Ints  # [n]
    alive: Bools  # [i]
    busy_s: Floats  # [i] seconds of scoring already given to each worker
    backlog_s: float  # scoring of finished samples that no worker has, in worker seconds
    num_samples: int  # of the iteration
    roles: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Move:
    """`destinations[j]` for the j-th sample of the tail; its home where it stays."""

    destinations: tuple[int, ...]
    text: str
    gain_s: float


def decide(tail: Tail, lengths: LengthModel, cost: CostModel, policy: Policy) -> Move | None:
    """The move to make now, or None: nothing pays by the margin, or a later move pays more."""
    num = len(tail.sample_ids)
    scenarios = max(2, min(12, 4096 // num))
    quantiles = stratified(scenarios, tail.sample_ids)
    remaining = lengths.remaining(tail.tokens, quantiles)
    ask = _Forecast(tail, remaining, cost, policy)
    stay_s = ask.end_s(np.zeros(len(tail.alive), dtype=np.bool_), 0)
    enough_s = (1.0 - policy.margin) * stay_s
    # No move makes the longest sample faster than alone on an instance.
    if float(remaining.max(axis=1).mean()) * cost.step_s(1) >= enough_s:
        return None
    plans = [(ask.end_s(keep, num), i, keep) for i, keep in enumerate(keep_sets(tail, policy))]
    expected = remaining.mean(axis=0)
    for now_s, _, keep in sorted(plans, key=lambda plan: plan[:2]):
        if now_s >= enough_s or any(
            ask.end_s(keep, max(1, int(part * num))) < now_s for part in LATER if num > 2
        ):
            return None
        destinations = assign(tail, keep, expected, policy)
        if destinations is not None:
            return _move(tail, keep, destinations, now_s, stay_s)
    return None


def _move(
    tail: Tail, keep: Bools, destinations: tuple[int, ...], now_s: float, stay_s: float
) -> Move:
    num = len(tail.sample_ids)
    moved = int(np.sum(np.asarray(destinations) != tail.home))
    text = (
        f"{moved} of {num} running samples move, {int(keep.sum())} of {int(tail.alive.sum())} "
        f"instances go on: end in {now_s:.3f} s instead of {stay_s:.3f} s"
    )
    return Move(destinations, text, stay_s - now_s)


def decide_by_threshold(tail: Tail, cost: CostModel, policy: Policy) -> Move | None:
    """RLHFuse's rule (arXiv 2409.13221, section 4): when the unfinished part falls below the
    threshold, keep the least number of instances whose batch capacity (decode latency not yet
    rising) and cache hold the tail, those with the most remaining samples."""
    num = len(tail.sample_ids)
    if num > policy.paper_threshold * tail.num_samples:
        return None
    flat = [b for b in range(1, policy.max_running + 1) if cost.step_s(b) <= 1.5 * cost.step_s(1)]
    counts = np.bincount(tail.home, minlength=len(tail.alive))
    least = -(-num // max(flat, default=1))
    for number in range(least, int(np.count_nonzero(counts))):
        destinations = assign(tail, _fullest(tail, number), -tail.tokens, policy)
        if destinations is not None:
            text = f"{num} of {tail.num_samples} samples remain: {number} instances go on"
            return Move(destinations, text, 0.0)
    return None


def decide_forced(tail: Tail, policy: Policy) -> Move | None:
    """What the policy orders, once no more than `forced_count` samples remain."""
    if len(tail.sample_ids) > policy.forced_count:
        return None
    keep = _fullest(tail, policy.forced_keep)
    destinations = assign(tail, keep, -tail.tokens, policy)
    return None if destinations is None else Move(destinations, "ordered", 0.0)


def _fullest(tail: Tail, number: int) -> Bools:
    """The `number` live instances with the most running samples."""
    counts = np.bincount(tail.home, minlength=len(tail.alive))
    order = sorted(np.flatnonzero(tail.alive).tolist(), key=lambda i: (-counts[i], i))
    keep = np.zeros(len(tail.alive), dtype=np.bool_)
    keep[order[:number]] = True
    return keep


def keep_sets(tail: Tail, policy: Policy) -> list[Bools]:
    """Sets of instances that could go on: whole blocks, those with the most samples first; fewer
    than now (consolidation), or more (spreading again once scoring has run dry)."""
    counts = np.bincount(tail.home, minlength=len(tail.alive))
    blocks: list[Ints] = [
        np.arange(first, min(first + policy.block, len(counts)))
        for first in range(0, len(counts), policy.block)
    ]
    usable = [b for b in blocks if bool(tail.alive[b].all())]
    usable.sort(key=lambda b: (-int(counts[b].sum()), tail.busy_s[b].max(), int(b[0])))
    in_use = sum(1 for b in usable if counts[b].any())
    sizes = {1, 2, 3, 4, in_use // 4, in_use // 3, in_use // 2, 2 * in_use // 3, 3 * in_use // 4}
    sizes |= {in_use - 1, in_use + 1, 2 * in_use, len(usable)} - {in_use}
    sets = []
    for size in sorted(s for s in sizes if 0 < s <= len(usable) and s != in_use):
        keep = np.zeros(len(counts), dtype=np.bool_)
        for block in usable[:size]:
            keep[block] = True
        sets.append(keep)
    return sets


def assign(tail: Tail, keep: Bools, remaining: Floats, policy: Policy) -> tuple[int, ...] | None:
    """Homes after consolidating on `keep`, longest first to the emptiest; None where it cannot
    be promised that everything fits to the end (slots, and cache at the response limit)."""
    most = -(-len(tail.home) // int(keep.sum()))
    count = dict.fromkeys(np.flatnonzero(keep).tolist(), 0)
    cache = dict.fromkeys(count, 0.0)
    need = tail.prompts + policy.max_response_tokens
    homes = tail.home.tolist()
    moving = []
    for j, home in enumerate(homes):
        if home in count and count[home] < most:
            count[home] += 1
            cache[home] += need[j]
        else:
            moving.append(j)
    heap = [(number, i) for i, number in count.items()]
    heapq.heapify(heap)
    for j in sorted(moving, key=lambda j: (-remaining[j], j)):
        number, home = heapq.heappop(heap)
        cache[home] += need[j]
        if number >= policy.max_running or 0 < policy.cache_tokens < cache[home]:
            return None
        homes[j] = home
        heapq.heappush(heap, (number + 1, home))
    return tuple(homes)


class _Forecast:
    """`forecast.end_s` with everything but the plan filled in."""

    def __init__(self, tail: Tail, remaining: Floats, cost: CostModel, policy: Policy) -> None:
        self._tail, self._remaining, self._policy = tail, remaining, policy
        self._context = tail.prompts + tail.tokens
        self._table = cost.step_table(max(64, min(len(tail.home), 4096)))
        self._decode_context_s = cost.decode_context_s
        rates: Sequence[float] = [cost.score_token_s[role] for role in tail.roles] or [0.0]
        self._score_token_s, self._last_token_s = sum(rates), max(rates)
        mean = float(self._context.mean())
        cached = cost.cache_pays(mean)
        self._stall_token_s = cost.migrate_token_s if cached else cost.prefill_token_s
        self._stall_call_s = cost.migrate_call_s + (0.0 if cached else cost.prefill_call_s)

    def end_s(self, keep: Bools, at_count: int) -> float:
        tail = self._tail
        return float(
            end_s(
                self._remaining,
                self._context,
                tail.home,
                tail.busy_s,
                tail.alive,
                keep,
                at_count,
                self._table,
                self._decode_context_s,
                self._stall_token_s,
                self._stall_call_s,
                self._score_token_s,
                self._last_token_s,
                tail.backlog_s,
                self._policy.block,
            )
        )
