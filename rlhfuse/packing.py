"""Samples -> mini-batches -> micro-batches: pure functions of sample ids and lengths.

Nothing here knows when or where a sample was generated, so fused and serial runs cut the same
batches in the same order, and reductions in that order give the same bits. The order of the input
never matters.
"""

import heapq
from collections.abc import Sequence

import numpy as np

SampleIds = tuple[int, ...]
_Part = tuple[int, SampleIds]  # (token sum, ids)


def minibatches(
    samples: Sequence[tuple[int, int]], *, prompts_per_minibatch: int, seed: int | None = None
) -> tuple[SampleIds, ...]:
    """Cut (sample id, group) pairs into mini-batches of whole groups, ids ascending in each.

    Groups follow one another by number, or shuffled by `seed` (one per epoch, say).

    Raises:
        ValueError: the number of groups does not divide, or an id comes twice.
    """
    members: dict[int, list[int]] = {}
    for sample_id, group in samples:
        members.setdefault(group, []).append(sample_id)
    _check_distinct([sample_id for sample_id, _ in samples])
    if prompts_per_minibatch < 1 or len(members) % prompts_per_minibatch:
        raise ValueError(
            f"{len(members)} prompts cannot be cut into mini-batches of {prompts_per_minibatch} "
            "(ppo_mini_batch_size): choose a divisor"
        )
    order = sorted(members)
    if seed is not None:
        order = [order[i] for i in np.random.default_rng(seed).permutation(len(order))]
    return tuple(
        tuple(sorted(s for group in order[i : i + prompts_per_minibatch] for s in members[group]))
        for i in range(0, len(order), prompts_per_minibatch)
    )


def microbatches(
    samples: Sequence[tuple[int, int]],
    *,
    num_microbatches: int = 0,
    token_budget: int = 0,
    padded: bool = False,
) -> tuple[SampleIds, ...]:
    """Cut (sample id, tokens) pairs into micro-batches of even token counts.

    Either their number is given, or the most tokens in one: then as few as fit (a sample longer
    than the budget goes alone; `padded`: each sample counts as the longest beside it). Ids ascend
    within each; small micro-batches stand at both ends, where a pipeline fills and drains, large
    ones in the middle.

    Raises:
        ValueError: not exactly one of the two given, fewer samples than micro-batches, an id
            twice.
    """
    if (num_microbatches > 0) == (token_budget > 0):
        raise ValueError(
            f"micro-batches: give one of {num_microbatches=} and {token_budget=}, positive"
        )
    _check_distinct([sample_id for sample_id, _ in samples])
    if num_microbatches > len(samples):
        raise ValueError(
            f"{len(samples)} samples cannot fill {num_microbatches} micro-batches: "
            "lower num_microbatches or raise the mini-batch size"
        )
    if not samples:
        return ()
    lengths = dict(samples)
    if num_microbatches:
        parts = balanced(samples, num_microbatches)
    else:
        number = min(len(samples), -(-sum(lengths.values()) // token_budget))
        parts = balanced(samples, number)
        while number < len(samples) and not _fits(parts, lengths, token_budget, padded=padded):
            number += 1
            parts = balanced(samples, number)
    by_size = sorted(parts, key=lambda part: (sum(lengths[s] for s in part), part))
    return tuple(by_size[0::2] + by_size[1::2][::-1])


def balanced(samples: Sequence[tuple[int, int]], num_parts: int) -> tuple[SampleIds, ...]:
    """`num_parts` parts of nearly equal token sums: Karmarkar and Karp's differencing method
    (1982). Parts by falling sum; empty ones only where samples are too few."""
    heap: list[tuple[int, int, tuple[_Part, ...]]] = []
    empty: _Part = (0, ())
    for order, (tokens, sample_id) in enumerate(sorted((t, s) for s, t in samples)):
        parts = ((tokens, (sample_id,)), *(empty,) * (num_parts - 1))
        heap.append((-tokens if num_parts > 1 else 0, -order, parts))
    heapq.heapify(heap)
    order = len(heap)
    while len(heap) > 1:
        _, _, large = heapq.heappop(heap)
        _, _, small = heapq.heappop(heap)
        # The largest sums of one meet the smallest of the other.
        pairs = zip(large, small[::-1], strict=True)
        merged = [(a[0] + b[0], tuple(sorted(a[1] + b[1]))) for a, b in pairs]
        merged.sort(key=lambda part: (-part[0], part[1]))
        order += 1
        heapq.heappush(heap, (merged[-1][0] - merged[0][0], -order, tuple(merged)))
    if not heap:
        return ((),) * num_parts
    return tuple(ids for _, ids in heap[0][2])


def _fits(
    parts: Sequence[SampleIds], lengths: dict[int, int], token_budget: int, *, padded: bool
) -> bool:
    def rows(part: SampleIds) -> int:
        sizes = [lengths[s] for s in part]
        return max(sizes) * len(sizes) if padded else sum(sizes)

    return all(len(part) <= 1 or rows(part) <= token_budget for part in parts)


def _check_distinct(ids: Sequence[int]) -> None:
    if len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})[:3]
        raise ValueError(f"sample ids must be distinct: {twice} come more than once")
