"""Which queued sample starts where: longest expected first, to the least expected work."""

import heapq
from collections import deque
from collections.abc import Mapping

from rlhfuse.rollout.fleet import Fleet
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import Policy
from rlhfuse.sample import Sample, SampleState


def queue_order(samples: Mapping[int, Sample], lengths: LengthModel) -> list[int]:
    """Longest expected work first: what remains to balance at the end is then small. Siblings
    stay together."""
    keys = [
        (-lengths.expected_tokens(s) - s.response_tokens, -s.prompt_tokens, s.group, s.id)
        for s in samples.values()
    ]
    keys.sort()
    return [key[-1] for key in keys]


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
    workers = fleet.workers
    heap = [(w.expected * w.slowness, w.load, i) for i, w in enumerate(workers[:first]) if w.alive]
    others = [(w.expected, w.load, i) for i, w in enumerate(workers[first:], first) if w.alive]
    heapq.heapify(heap)
    share = _share(queue, samples, fleet, lengths) if policy.shared_prefix else 0.0
    given: dict[int, list[int]] = {}
    homes: dict[int, int] = {}  # group -> instance that got a sibling last
    if not heap:
        heap, others = others, []
        heapq.heapify(heap)
    while queue and heap:
        sample = samples[queue[0]]
        work, load, instance = heap[0]
        worker = workers[instance]
        if (worker.expected * worker.slowness, worker.load) != (work, load):
            heapq.heapreplace(heap, (worker.expected * worker.slowness, worker.load, instance))
            continue
        if not fleet.has_room(instance, sample):
            heapq.heappop(heap)
            if not heap and others:
                heap, others = others, []
                heapq.heapify(heap)
            continue
        expected = lengths.expected_tokens(sample)
        if policy.shared_prefix:
            home = homes.get(sample.group, instance)
            if workers[home].expected + expected <= share and fleet.has_room(home, sample):
                instance = home
            homes[sample.group] = instance
        queue.popleft()
        sample.move(SampleState.RUNNING, instance)
        fleet.place(sample, expected, now_s)
        if instance == heap[0][2]:
            heapq.heapreplace(heap, (worker.expected * worker.slowness, worker.load, instance))
        given.setdefault(instance, []).append(sample.id)
    return given


def _share(
    queue: "deque[int]", samples: Mapping[int, Sample], fleet: Fleet, lengths: LengthModel
) -> float:
    """Expected tokens, running and queued, per live instance."""
    running = sum(worker.expected for worker in fleet.workers)
    queued = sum(lengths.expected_tokens(samples[i]) for i in queue)
    return (running + queued) / max(fleet.num_alive, 1)
