"""When to weigh whether the tail should move, and the snapshot that the decision is made on."""

from collections.abc import Mapping

import numpy as np

from rlhfuse.cost import CostModel
from rlhfuse.rollout.fleet import Fleet
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.migration import Move, Tail, decide, decide_by_threshold, decide_forced
from rlhfuse.rollout.policy import Migration, Policy
from rlhfuse.sample import Sample

LOOK_AGAIN = 0.05  # part of the running samples that must finish before the tail is weighed again
LOOK_AGAIN_S = 0.2  # or this much time must pass, or the same part of the time since the start


class TailWatch:
    """One iteration's decisions to move. Weighs again only when enough has changed."""

    def __init__(self, fleet: Fleet, cost: CostModel, policy: Policy, lengths: LengthModel) -> None:
        self._fleet, self._cost, self._policy, self._lengths = fleet, cost, policy, lengths
        self._weighed = (0, float("-inf"))  # samples generating, time
        self._moved_s = float("-inf")
        self._start_s: float | None = None
        self._threshold_passed = False

    def due(self, now_s: float, num_generating: int) -> bool:
        """Whether to weigh now. At least two workers, no move under way, enough changed."""
        policy, fleet = self._policy, self._fleet
        if policy.migration is Migration.OFF or fleet.num_inbound or fleet.num_alive < 2:
            return False
        count, at_s = self._weighed
        part = LOOK_AGAIN if num_generating < 1000 else 2 * LOOK_AGAIN
        changed = num_generating > count or count - num_generating > part * num_generating
        self._start_s = now_s if self._start_s is None else self._start_s
        pause_s = max(LOOK_AGAIN_S, LOOK_AGAIN * (now_s - self._start_s))
        if not changed and now_s - at_s < pause_s:
            return False
        if now_s - self._moved_s < policy.hysteresis_s:
            return False
        self._weighed = (num_generating, now_s)
        return True

    def weigh(
        self, samples: Mapping[int, Sample], backlog_s: float, roles: tuple[str, ...]
    ) -> Move | None:
        """The move to make now. `backlog_s`: scoring that no worker has been given."""
        tail = self._tail(samples, backlog_s, roles)
        if self._policy.migration in (Migration.PAPER, Migration.FORCED):
            move = None if self._threshold_passed else self._by_threshold(tail)
        else:
            move = decide(tail, self._lengths, self._cost, self._policy)
        if move is not None:
            self._moved_s = self._weighed[1]
        return move

    def _by_threshold(self, tail: Tail) -> Move | None:
        paper = self._policy.migration is Migration.PAPER
        move = (
            decide_by_threshold(tail, self._cost, self._policy)
            if paper
            else decide_forced(tail, self._policy)
        )
        self._threshold_passed = move is not None
        return move

    def _tail(
        self, samples: Mapping[int, Sample], backlog_s: float, roles: tuple[str, ...]
    ) -> Tail:
        workers = self._fleet.workers
        running = [samples[sample_id] for worker in workers for sample_id in worker.running]
        most = self._policy.max_response_tokens - 1
        tokens = [
            min(samples[sample_id].response_tokens + worker.ahead, most)
            for worker in workers
            for sample_id in worker.running
        ]
        return Tail(
            sample_ids=np.array([s.id for s in running], dtype=np.int64),
            tokens=np.array(tokens, dtype=np.float64),
            prompts=np.array([s.prompt_tokens for s in running], dtype=np.float64),
            home=np.array([s.instance for s in running], dtype=np.int64),
            alive=np.array([worker.alive for worker in workers], dtype=np.bool_),
            busy_s=np.array([worker.busy_s for worker in workers], dtype=np.float64),
            backlog_s=backlog_s,
            num_samples=len(samples),
            roles=roles,
        )
