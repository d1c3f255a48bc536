"""The rollout scheduler: events in, commands out. No I/O, no clock, no tensors.

One iteration: every sample is generated on some instance, then scored by every role (and by the
reward function, where there is one). With inter-stage fusion, workers without running samples
score finished ones while others still generate, and the tail moves when that is predicted to
end everything sooner (RLHFuse, arXiv 2409.13221, section 4, made a decision of the cost model).
What is computed never depends on what is decided here: only when and where.
"""

import heapq
from collections import deque
from collections.abc import Sequence

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.fleet import Fleet, shown
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.migration import Move
from rlhfuse.rollout.policy import InterStage, Policy
from rlhfuse.rollout.scoring import ScoreBoard, spread
from rlhfuse.rollout.tail import TailWatch
from rlhfuse.sample import Sample, SampleState

S = SampleState
GENERATING = (S.RUNNING, S.MOVING)


class RolloutScheduler:
    """Drives `instances` workers through iterations; `roles` are scored by models.

    `function_reward`: samples also need a `Rewarded` event. `lengths` predicts response lengths
    and learns from every iteration. Reports that no longer apply (from a lost instance, of a
    dropped sample) are ignored.
    """

    def __init__(
        self,
        instances: int,
        roles: tuple[str, ...],
        cost: CostModel,
        policy: Policy,
        *,
        function_reward: bool = False,
        lengths: LengthModel | None = None,
    ) -> None:
        if instances < 1:
            raise ValueError(f"rollout: {instances} instances; at least one is needed")
        unknown = [role for role in roles if role not in cost.score_token_s]
        if unknown:
            raise ValueError(f"rollout: the cost model has no scoring rate for {unknown}")
        self.cost = cost
        self.policy = policy
        self.roles = roles
        self.lengths = lengths or LengthModel(policy.max_response_tokens)
        self._function_reward = function_reward
        self._fleet = Fleet(instances, policy)
        self._begin(())

    def _begin(self, samples: Sequence[Sample]) -> None:
        self._samples = {sample.id: sample for sample in samples}
        assert len(self._samples) == len(samples), "sample ids repeat"
        self._queue: deque[int] = deque()
        self._board = ScoreBoard(self.roles, self.cost)
        self._unrewarded: set[int] = set()
        self._rewards_asked: set[int] = set()
        self._num_generating = len(samples)  # QUEUED, RUNNING or MOVING
        self._num_open = len(samples)  # neither SCORED nor DROPPED
        self._tail_watch = TailWatch(self._fleet, self.cost, self.policy, self.lengths)
        self._now_s = 0.0

    # --- questions -------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Every sample is SCORED or DROPPED."""
        return self._num_open == 0

    @property
    def num_generating(self) -> int:
        """Samples whose response is not complete."""
        return self._num_generating

    def waiting_for(self) -> str:
        """What the iteration still waits for, for people."""
        parts = [f"{len(self._queue)} samples queued"] if self._queue else []
        parts += self._fleet.outstanding()
        for role, waiting in self._board.pending.items():
            if waiting:
                parts.append(f"{role} scores of {shown(waiting)} not given out")
        if self._rewards_asked:
            parts.append(f"rewards of {shown(self._rewards_asked)}")
        return "; ".join(parts) or "nothing"

    # --- events ----------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> list[ev.Command]:
        """The commands that follow from `event`, to be executed in order."""
        assert event.now_s >= self._now_s or isinstance(event, ev.Started), "time went back"
        self._now_s = event.now_s
        out: list[ev.Command] = []
        match event:
            case ev.Finished():
                self._finished(event)
            case ev.Scored():
                self._scored(event)
            case ev.Progress():
                self._progressed(event)
            case ev.Rewarded():
                self._rewarded(event.sample_id)
            case ev.Started():
                self._started(event)
            case ev.Tick():
                pass
            case _:
                self._rare(event)
        self._advance(out)
        return out

    def _rare(self, event: ev.Event) -> None:
        match event:
            case ev.Left():
                self._left(event)
            case ev.Dropped():
                self._dropped(event)
            case ev.InstanceLost():
                self._lost(event.instance)
            case ev.InstanceReady():
                self._fleet.revive(event.instance)

    def _started(self, event: ev.Started) -> None:
        assert self.done, f"the iteration before is not done: {self.waiting_for()}"
        self.lengths.begin()
        self._begin(event.samples)
        self._now_s = event.now_s
        assert all(s.state is S.QUEUED for s in event.samples), "samples must be QUEUED"
        # Longest known work first: what remains to balance at the end is then small.
        order = sorted(event.samples, key=lambda s: (-s.total_tokens, s.id))
        self._queue.extend(sample.id for sample in order)

    def _progressed(self, event: ev.Progress) -> None:
        samples, instance = self._samples, event.instance
        self._fleet.workers[instance].ahead = 0
        for sample_id, tokens in event.lengths:
            sample = samples.get(sample_id)
            if sample is not None and sample.instance == instance and sample.state in GENERATING:
                sample.response_tokens = tokens

    def _finished(self, event: ev.Finished) -> None:
        sample = self._samples.get(event.sample_id)
        if sample is None or not _is_on(event.instance, sample):
            return
        self._fleet.remove(sample)
        self._fleet.grew(event.instance, event.response_tokens - sample.response_tokens)
        sample.response_tokens = event.response_tokens
        sample.move(S.FINISHED)
        self._num_generating -= 1
        self.lengths.observe(event.response_tokens)
        if self.roles:
            self._board.add(sample.id, sample.total_tokens)
        if self._function_reward:
            self._unrewarded.add(sample.id)
        self._settle(sample)

    def _scored(self, event: ev.Scored) -> None:
        self._fleet.answered(event.worker, event.role, event.sample_ids)
        for sample_id in self._board.done(event.worker, event.role, event.sample_ids):
            self._settle(self._samples[sample_id])

    def _rewarded(self, sample_id: int) -> None:
        self._rewards_asked.discard(sample_id)
        if sample_id in self._samples and self._samples[sample_id].state is S.FINISHED:
            self._unrewarded.discard(sample_id)
            self._settle(self._samples[sample_id])

    def _settle(self, sample: Sample) -> None:
        """FINISHED -> SCORED when nothing is outstanding."""
        outstanding = sample.id in self._unrewarded or sample.id in self._rewards_asked
        if not outstanding and self._board.complete(sample.id):
            sample.move(S.SCORED)
            self._num_open -= 1

    def _left(self, event: ev.Left) -> None:
        sample = self._samples.get(event.sample_id)
        if sample is None or sample.state is not S.MOVING or sample.instance != event.instance:
            return
        sample.response_tokens = event.response_tokens
        destination = self._fleet.remove(sample)
        assert destination is not None
        if self._fleet.workers[destination].alive:
            sample.move(S.RUNNING, destination)
            self._fleet.place(sample)
        else:
            self._requeue(sample)

    def _requeue(self, sample: Sample) -> None:
        sample.move(S.QUEUED)
        self._queue.appendleft(sample.id)

    def _dropped(self, event: ev.Dropped) -> None:
        sample = self._samples.get(event.sample_id)
        if sample is None or sample.state is S.DROPPED:
            return
        if sample.state is S.QUEUED:
            self._queue.remove(sample.id)
        self._fleet.remove(sample)
        self._num_generating -= sample.state in (S.QUEUED, S.RUNNING, S.MOVING)
        self._num_open -= sample.state is not S.SCORED
        self._board.forget(sample.id)
        self._unrewarded.discard(sample.id)
        self._rewards_asked.discard(sample.id)
        sample.drop_reason = event.reason
        sample.move(S.DROPPED)

    def _lost(self, instance: int) -> None:
        if not self._fleet.workers[instance].alive:
            return
        for sample_id in self._fleet.lose(instance):
            sample = self._samples[sample_id]
            self._fleet.remove(sample)
            self._requeue(sample)
        for sample_id in self._board.lose(instance):
            sample = self._samples[sample_id]
            if sample.state is S.SCORED:
                sample.move(S.FINISHED)
                self._num_open += 1

    # --- decisions -------------------------------------------------------------------------

    def _advance(self, out: list[ev.Command]) -> None:
        if self._queue:
            self._dispatch(out)
        elif self._fused and self._num_generating:
            self._weigh_tail(out)
        if self._fused or not self._num_generating:
            self._ask_rewards(out)
            if self._board.num_pending:
                self._give_scores(out)

    @property
    def _fused(self) -> bool:
        return self.policy.inter_stage is not InterStage.OFF

    def _dispatch(self, out: list[ev.Command]) -> None:
        """Queued samples to the instance with the fewest tokens to hold, while there is room."""
        fleet = self._fleet
        heap = [(w.load, len(w.running), i) for i, w in enumerate(fleet.workers) if w.alive]
        heapq.heapify(heap)
        given: dict[int, list[int]] = {}
        while self._queue and heap:
            sample = self._samples[self._queue[0]]
            _, _, instance = heap[0]
            if not fleet.has_room(instance, sample):
                heapq.heappop(heap)
                continue
            self._queue.popleft()
            sample.move(S.RUNNING, instance)
            fleet.place(sample)
            given.setdefault(instance, []).append(sample.id)
            worker = fleet.workers[instance]
            heapq.heapreplace(heap, (worker.load, len(worker.running), instance))
        for instance in sorted(given):
            self._wake(instance, out)
            out.append(ev.Generate(instance, tuple(given[instance])))

    def _wake(self, instance: int, out: list[ev.Command]) -> None:
        if self._fleet.workers[instance].asleep:
            self._fleet.workers[instance].asleep = False
            out.append(ev.Wake(instance))

    def _weigh_tail(self, out: list[ev.Command]) -> None:
        if self._tail_watch.due(self._now_s, self._num_generating):
            move = self._tail_watch.weigh(self._samples, self._board.pending_s, self.roles)
            if move is not None:
                self._migrate(move, out)

    def _migrate(self, move: Move, out: list[ev.Command]) -> None:
        out.append(ev.Decision(move.text, move.gain_s))
        running = [s for w in self._fleet.workers for s in w.running]
        orders: dict[tuple[int, int, bool], list[int]] = {}
        for sample_id, destination in zip(running, move.destinations, strict=True):
            sample = self._samples[sample_id]
            assert sample.instance is not None
            if sample.instance != destination:
                cached = self.cost.cache_pays(sample.total_tokens)
                orders.setdefault((sample.instance, destination, cached), []).append(sample_id)
                source = sample.instance
                sample.move(S.MOVING)
                sample.instance = source
                self._fleet.send(sample, destination)
        for (source, destination, cached), ids in sorted(orders.items()):
            self._wake(destination, out)
            out.append(ev.Migrate(source, destination, tuple(ids), cached))

    def _ask_rewards(self, out: list[ev.Command]) -> None:
        if self._unrewarded:
            ids = tuple(sorted(self._unrewarded))
            self._unrewarded.clear()
            self._rewards_asked.update(ids)
            out.append(ev.Reward(ids))

    def _give_scores(self, out: list[ev.Command]) -> None:
        if not self._fused:
            alive = self._fleet.scorers()
            calls = spread(self._board, alive, self.policy.score_token_budget) if alive else []
            for worker, role, ids in calls:
                self._give(worker, role, ids, out)
            return
        while self._board.num_pending and (scorer := self._fleet.next_scorer()) is not None:
            role = self._board.best_role(self._fleet.workers[scorer].last_role)
            ids = self._board.take(role, self._call_tokens(role))
            self._give(scorer, role, ids, out)

    def _call_tokens(self, role: str) -> float:
        """Most tokens for the next call: what is pending is cut so that all workers can share it
        and finish together, down to where the overhead of a call would weigh."""
        rate = self.cost.score_token_s[role]
        share_s = self._board.pending_s / (2 * self._fleet.num_alive)
        least_s = 10 * self.cost.score_call_s
        return min(self.policy.score_token_budget, max(share_s, least_s) / max(rate, 1e-12))

    def _give(self, worker: int, role: str, ids: tuple[int, ...], out: list[ev.Command]) -> None:
        state = self._fleet.workers[worker]
        if self.policy.sleep_when_free and not state.asleep:
            state.asleep = True
            out.append(ev.Sleep(worker))
        seconds = self.cost.score_s(role, sum(self._board.tokens[s] for s in ids))
        self._board.give(worker, role, ids)
        self._fleet.call(worker, role, ids, seconds)
        out.append(ev.Score(worker, role, ids))

    # --- invariants ------------------------------------------------------------------------

    def validate(self) -> None:
        """Assert that the books agree. O(samples): for tests and the end of an iteration."""
        states = [s.state for s in self._samples.values()]
        open_states = (S.QUEUED, S.RUNNING, S.MOVING)
        assert self._num_generating == sum(s in open_states for s in states)
        assert self._num_open == sum(s not in (S.SCORED, S.DROPPED) for s in states)
        queued = {i for i, s in self._samples.items() if s.state is S.QUEUED}
        assert queued == set(self._queue)
        assert len(queued) == len(self._queue)
        self._fleet.validate(self._samples)
        finished = {i for i, s in self._samples.items() if s.state in (S.FINISHED, S.SCORED)}
        self._board.validate(finished)
        for sample in self._samples.values():
            if sample.state is S.SCORED:
                assert self._board.complete(sample.id)
                assert sample.id not in self._unrewarded | self._rewards_asked


def _is_on(instance: int, sample: Sample) -> bool:
    return sample.instance == instance and sample.state in GENERATING
