"""Laws of the tail's moves: who goes where."""

import heapq
from dataclasses import replace

import numpy as np
import pytest

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.forecast import Bools, Floats
from rlhfuse.rollout.migration import assign
from rlhfuse.rollout.policy import Migration, Policy
from rlhfuse.rollout.scheduler import RolloutScheduler
from rlhfuse.rollout.snapshot import Tail, whole_iteration
from rlhfuse.sample import Sample


def _dealt_one_by_one(
    tail: Tail, keep: Bools, remaining: Floats, policy: Policy
) -> tuple[int, ...] | None:
    """Kept homes keep what an even share allows; the rest, longest first, to the emptiest."""
    most = -(-len(tail.home) // int(keep.sum()))
    need = (tail.prompts + policy.max_response_tokens).tolist()
    homes = tail.home.tolist()
    count = dict.fromkeys(np.flatnonzero(keep).tolist(), 0)
    cache = dict.fromkeys(count, 0.0)
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


@pytest.mark.parametrize("cache_tokens", [0, 300, 1000])
def test_samples_are_dealt_to_the_emptiest(cache_tokens: int) -> None:
    rng = np.random.default_rng(cache_tokens)
    refused = 0
    for _ in range(300):
        num, instances = int(rng.integers(1, 60)), int(rng.integers(1, 12))
        tail = replace(
            whole_iteration(num, instances, 5.0),
            home=rng.integers(0, instances, num),
            prompts=rng.integers(1, 20, num).astype(np.float64),
        )
        keep = rng.random(instances) < rng.random()
        keep[rng.integers(0, instances)] = True
        policy = Policy(
            max_response_tokens=20, max_running=int(rng.integers(1, 40)), cache_tokens=cache_tokens
        )
        remaining = rng.integers(1, 9, num).astype(np.float64)
        wanted = _dealt_one_by_one(tail, keep, remaining, policy)
        assert assign(tail, keep, remaining, policy) == wanted
        refused += wanted is None
    assert 0 < refused < 300


@pytest.mark.parametrize("moves_cache", [True, False])
def test_each_sample_takes_its_cache_or_is_prefilled_again_whichever_is_cheaper(
    moves_cache: bool,
) -> None:
    """Where engines can hand it over. Here a cache is cheaper up to 50 tokens."""
    cost = replace(
        CostModel.default(), prefill_call_s=0.01, prefill_token_s=1e-4, migrate_token_s=3e-4
    )
    policy = Policy(
        migration=Migration.FORCED, forced=((24, 1),), moves_cache=moves_cache, max_running=64
    )
    scheduler = RolloutScheduler(2, (), cost, policy)
    prompts = [1 + 5 * i for i in range(24)]
    samples = [
        Sample(id=i, group=i, prompt_tokens=prompts[i], seed=i, policy_version=0) for i in range(24)
    ]
    scheduler.handle(ev.Started(0.0, tuple(samples)))
    lengths = tuple((i, 3) for i in range(24))
    at = {k: tuple((i, n) for i, n in lengths if samples[i].instance == k) for k in (0, 1)}
    orders = [
        order
        for instance in (0, 1)
        for order in scheduler.handle(ev.Progress(1.0 + instance, instance, at[instance]))
        if isinstance(order, ev.Migrate)
    ]
    taken = {i: order.with_cache for order in orders for i in order.sample_ids}
    assert len(taken) == 12
    for i, with_cache in taken.items():
        context = prompts[i] + 3.0
        cheaper = cost.migrate_s(context, with_cache=True) <= cost.migrate_s(
            context, with_cache=False
        )
        assert with_cache == (moves_cache and cheaper), context
    assert set(taken.values()) == ({True, False} if moves_cache else {False})
