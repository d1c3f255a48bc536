"""Which queued sample starts where: longest expected first, to the least expected work."""

from collections import deque
from collections.abc import Mapping
from itertools import islice

import numpy as np

from rlhfuse.rollout import running as columns
from rlhfuse.rollout.fleet import Fleet
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import Policy
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
        waiting = columns.Waiting(
            np.array([fleet.number[s.id] for s in head], dtype=np.int64),
            np.array([s.response_tokens for s in head], dtype=np.int64),
            np.array([lengths.expected_tokens(s) for s in head], dtype=np.float64),
            np.array([fleet.group_number(s) if shared else 0 for s in head], dtype=np.int64),
        )
        homes = columns.deal(
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


def _share(
    queue: "deque[int]", samples: Mapping[int, Sample], fleet: Fleet, lengths: LengthModel
) -> float:
    """Expected tokens, running and queued, per live instance."""
    queued = sum(lengths.expected_tokens(samples[i]) for i in queue)
    return (fleet.expected_tokens + queued) / max(fleet.num_alive, 1)
