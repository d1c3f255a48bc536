"""Laws of the tail's moves: who goes where."""

import heapq
from dataclasses import replace

import numpy as np
import pytest

from rlhfuse.rollout.forecast import Bools, Floats
from rlhfuse.rollout.migration import assign
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.snapshot import Tail, whole_iteration


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
