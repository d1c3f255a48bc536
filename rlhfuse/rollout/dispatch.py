"""Which queued sample starts where: longest expected first, to the least expected work."""

from collections import deque
from collections.abc import Mapping
from heapq import heapify, heappop, heapreplace
from itertools import islice
from typing import NamedTuple

import numba
import numpy as np

from rlhfuse.rollout import running as columns
from rlhfuse.rollout.fleet import Fleet
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import Policy
from rlhfuse.rollout.running import Floats, Ints
from rlhfuse.sample import Sample, SampleState

AT_FIRST = 16  # of the queue, looked at together; then four times as many, while all find a place


def queue_order(samples: Mapping[int, Sample], lengths: LengthModel) -> list[int]:
    """Longest expected work first: what remains to balance at the end is then small. Siblings
    stay together."""
    keys = [
        (-lengths.expected_tokens(s) - s.response_tokens, -s.prompt_tokens, s.group, s.id)
        for s in samples.values()
    ]
    keys.sort()
    return [key[-1] for key in keys]


class _Waiting(NamedTuple):
    """q samples of the queue, in order."""

    numbers: Ints  # [q]
    tokens: Ints  # [q] so far
    expected: Floats  # [q] to come
    groups: Ints  # [q] from 0 on


def dispatch(
    queue: "deque[int]",
    samples: Mapping[int, Sample],
    fleet: Fleet,
    lengths: LengthModel,
    policy: Policy,
    now_s: float,
    first: int,
) -> dict[int, list[int]]:
    """Take from the queue while there is room; returns the samples for each instance, which are
    RUNNING there. Work is expected tokens, times how slow the instance is seen to be. Where the
    engine keeps a prompt's cache, siblings follow one another to an instance until it has its
    share of all work. Only the `first` instances get any while they have room."""
    shared = policy.shared_prefix
    share = _share(queue, samples, fleet, lengths) if shared else 0.0
    last_home = np.full(fleet.num_groups if shared else 1, -1, dtype=np.int64)
    given: dict[int, list[int]] = {}
    most = AT_FIRST
    while queue:
        head = [samples[i] for i in islice(queue, most)]
        waiting = _Waiting(
            np.array([fleet.number[s.id] for s in head], dtype=np.int64),
            np.array([s.response_tokens for s in head], dtype=np.int64),
            np.array([lengths.expected_tokens(s) for s in head], dtype=np.float64),
            np.array([fleet.group_number(s) if shared else 0 for s in head], dtype=np.int64),
        )
        homes = _deal(
            fleet.running, waiting, last_home, first, policy.max_running, policy.cache_tokens,
            share if shared else -1.0, float(now_s),
        )  # fmt: skip
        for sample, instance in zip(head, homes.tolist(), strict=False):
            queue.popleft()
            sample.move(SampleState.RUNNING, instance)
            given.setdefault(instance, []).append(sample.id)
        if len(homes) < len(head):
            break
        most *= 4
    for instance in given:
        fleet.ready.note(instance)
    return given


@numba.njit(cache=True)
def _deal(r, waiting, last_home, first, max_running, cache_tokens, share, now_s):  # type: ignore[no-untyped-def]
    """Instances for the samples that wait, of as many as find a place; they run there now.
    `share`: expected tokens up to which siblings follow to `last_home`; below 0: they do not."""
    homes = np.empty(len(waiting.numbers), dtype=np.int64)
    heap, others = _by_work(r, 0, first), _by_work(r, first, len(r.workers))
    count = 0
    while count < len(homes) and len(heap) + len(others):
        if not len(heap):
            heap, others = others, heap
        work, load, i = heap[0]
        w = r.workers[i]
        if w.expected * w.slowness != work or w.load != load:
            heapreplace(heap, (w.expected * w.slowness, w.load, i))
            continue
        number, expected = waiting.numbers[count], waiting.expected[count]
        if not _has_room(r, i, number, max_running, cache_tokens):
            heappop(heap)
            continue
        to = i
        if share >= 0.0:
            home = last_home[waiting.groups[count]]
            home = i if home < 0 else home
            fits = _has_room(r, home, number, max_running, cache_tokens)
            if fits and r.workers[home].expected + expected <= share:
                to = home
            last_home[waiting.groups[count]] = to
        columns.place(r, number, to, waiting.tokens[count], expected, now_s)
        homes[count] = to
        count += 1
    return homes[:count]


@numba.njit(cache=True)
def _by_work(r, first, end):  # type: ignore[no-untyped-def]
    """A heap of (work, load, instance), of the live ones from `first` up to `end`."""
    heap = [(0.0, 0, -1)]
    heap.pop()
    for i in range(first, min(end, len(r.workers))):
        w = r.workers[i]
        if w.alive:
            heap.append((w.expected * w.slowness, w.load, i))
    heapify(heap)
    return heap


@numba.njit(cache=True)
def _has_room(r, i, number, max_running, cache_tokens):  # type: ignore[no-untyped-def]
    """Whether the sample fits to its very end, whatever its length."""
    w = r.workers[i]
    if w.num + w.inbound >= max_running:
        return False
    if cache_tokens == 0 or w.load == 0:
        return True
    return w.load + r.prompts[number] + r.limit <= cache_tokens


def _share(
    queue: "deque[int]", samples: Mapping[int, Sample], fleet: Fleet, lengths: LengthModel
) -> float:
    """Expected tokens, running and queued, per live instance."""
    queued = sum(lengths.expected_tokens(samples[i]) for i in queue)
    return (fleet.expected_tokens + queued) / max(fleet.num_alive, 1)
