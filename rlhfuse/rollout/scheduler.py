"""The rollout scheduler: events in, commands out. No I/O, no clock, no tensors.

One iteration: every sample is generated on some instance, then scored by every role (and by the
reward function, where there is one), and trained group by group where that was asked for. With
inter-stage fusion, workers without running samples score finished ones while others still
generate, and the tail moves when that is predicted to end everything sooner (RLHFuse, arXiv
2409.13221, section 4, made a decision of the cost model).
What is computed never depends on what is decided here: only when and where.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from math import inf

from rlhfuse.cost import CostModel
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.completion import Completion
from rlhfuse.rollout.dispatch import dispatch, queue_order
from rlhfuse.rollout.fleet import Fleet, shown
from rlhfuse.rollout.groups import TRAIN, Groups
from rlhfuse.rollout.inference import Inference
from rlhfuse.rollout.lengths import LengthModel
from rlhfuse.rollout.policy import InterStage, Policy
from rlhfuse.rollout.reward_ledger import RewardLedger
from rlhfuse.rollout.scoring import ScoreBoard, spared_cost
from rlhfuse.rollout.snapshot import Books
from rlhfuse.rollout.tail import TailWatch, carry_out, wake
from rlhfuse.sample import Sample, SampleState

S = SampleState
GENERATING = (S.RUNNING, S.MOVING)


class RolloutScheduler:
    """Drives `instances` workers through iterations; `roles` are scored by models.

    `function_reward`: samples also need a `Rewarded` event. `lengths` predicts response lengths
    and learns from every iteration. `train_groups`: forward and backward of complete groups are
    part of the iteration (no critic, one optimizer step per batch). `spared`: samples that a role
    need not score. Reports that no longer apply (from a lost instance, of a dropped sample) are
    ignored.
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
        train_groups: bool = False,
        spared: Mapping[str, frozenset[int]] | None = None,
    ) -> None:
        if instances < 1:
            raise ValueError(f"rollout: {instances} instances; at least one is needed")
        needed = (*roles, TRAIN) if train_groups else roles
        unknown = [role for role in needed if role not in cost.score_token_s]
        if unknown:
            raise ValueError(f"rollout: the cost model has no scoring rate for {unknown}")
        self.cost = cost
        self.policy = policy
        self.roles = roles
        self._fused = policy.inter_stage is not InterStage.OFF
        self.lengths = lengths or LengthModel(policy.max_response_tokens)
        self._function_reward = function_reward
        self._train = train_groups
        self._spared = spared or {}
        self._fleet = Fleet(instances, policy, cost)
        self._begin(())

    def _begin(self, samples: Sequence[Sample]) -> None:
        self._samples = {sample.id: sample for sample in samples}
        self._fleet.begin(samples)
        assert len(self._samples) == len(samples), "sample ids repeat"
        self._queue: deque[int] = deque()
        self._board = ScoreBoard(self.roles, self.cost, self._spared)
        self._groups = Groups(self._train)
        if self._train or self.policy.release_groups:
            self._groups.begin(samples)
        self._rewards = RewardLedger(self.policy.reward_tries)
        self._num_generating = len(samples)  # QUEUED, RUNNING or MOVING
        self._completion = Completion(
            self._samples, self._board, self._groups, self._rewards,
            function_reward=self._function_reward,
        )  # fmt: skip
        self._inference = Inference(self._fleet, self._board, self._groups, self.cost, self.policy)
        books = Books(self._fleet, self._board, self._groups, len(samples))
        expected = spared_cost(self.cost, self._samples, self._spared)
        self._tail_watch = TailWatch(books, expected, self.policy, self.lengths, self.roles)
        self._now_s = 0.0
        self._first = len(self._fleet.workers)  # instances that samples are dispatched to

    # --- questions -------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Every sample is SCORED or DROPPED, and every group trained where that was asked for."""
        return self._completion.num_open == 0 and self._groups.all_trained

    @property
    def all_scored(self) -> bool:
        """Every sample is SCORED or DROPPED; groups may be left to train."""
        return self._completion.num_open == 0

    @property
    def groups_trained(self) -> int:
        """Complete groups whose gradients are summed up."""
        return len(self._groups.trained)

    @property
    def num_generating(self) -> int:
        """Samples whose response is not complete."""
        return self._num_generating

    def quiet(self) -> tuple[int, float]:
        """(how many, until when): so many RUNNING samples may be complete before that moment, none
        of them the last of its instance, and no command follows."""
        if self._queue or (self._groups.members and not self.roles):
            return 0, inf
        if not self._fused:
            return self._num_generating - 1, inf
        if self._function_reward or (self._fleet.ready.place and (self.roles or self._train)):
            return 0, inf
        return self._tail_watch.quiet(self._now_s, self._num_generating)

    def waiting_for(self) -> str:
        """What the iteration still waits for, for people."""
        parts = [f"{len(self._queue)} samples queued"] if self._queue else []
        parts += self._fleet.outstanding()
        scores = [f"{len(ids)} {role}" for role, ids in self._board.pending.items() if ids]
        if scores:  # by number: they wait for what comes first
            parts.append(f"scores not given out yet: {', '.join(scores)}")
        if self._rewards.asked:
            parts.append(f"rewards of {shown(self._rewards.asked)}")
        if self._groups.pending:
            parts.append(f"{len(self._groups.pending)} groups to be trained")
        return "; ".join(parts) or "nothing"

    # --- events ----------------------------------------------------------------------------

    def handle(self, event: ev.Event) -> list[ev.Command]:
        """The commands that follow from `event`, to be executed in order."""
        assert event.now_s >= self._now_s or isinstance(event, ev.Started), "time went back"
        self._now_s = event.now_s
        out: list[ev.Command] = []
        match event:
            case ev.Completed():
                self._completed(event, out)
            case ev.Finished():
                self._finished(event, out)
            case ev.Scored():
                self._scored(event, out)
            case ev.Progress():
                self._progressed(event)
            case ev.Rewarded():
                self._completion.rewarded(event.sample_id, out)
            case ev.Started():
                self._started(event, out)
            case ev.Tick():
                pass
            case _:
                self._rare(event, out)
        self._advance(out)
        return out

    def _rare(self, event: ev.Event, out: list[ev.Command]) -> None:
        match event:
            case ev.Left():
                self._left(event)
            case ev.Trained():
                self._trained(event)
            case ev.NotTrained():
                self._fleet.answered(event.worker, TRAIN, event.sample_ids)
                group = self._samples[event.sample_ids[0]].group
                self._groups.give_back(event.worker, group)
            case ev.Dropped():
                self._dropped(event.sample_id, event.reason, out)
            case ev.RewardTimedOut():
                self._timed_out(event.sample_id, out)
            case ev.InstanceLost():
                self._lost(event)
            case ev.ScorerLost():
                self._fleet.lose_scorer(event.worker)
                self._groups.lose(event.worker)
                self._completion.lost(event.worker)
            case ev.InstanceReady():
                self._fleet.revive(event.instance)

    def _started(self, event: ev.Started, out: list[ev.Command]) -> None:
        assert self.done, f"the iteration before is not done: {self.waiting_for()}"
        self.lengths.begin(event.samples)
        self._begin(event.samples)
        self._now_s = event.now_s
        assert all(s.state is S.QUEUED for s in event.samples), "samples must be QUEUED"
        self._queue.extend(queue_order(self._samples, self.lengths))
        if self._fused:
            self._first = self._tail_watch.opening(event.samples, out)

    def _progressed(self, event: ev.Progress) -> None:
        samples, instance = self._samples, event.instance
        for sample_id, tokens in event.lengths:
            sample = samples.get(sample_id)
            if sample is not None and sample.instance == instance and sample.state in GENERATING:
                sample.response_tokens = tokens
                self._fleet.reached(instance, sample_id, tokens, self._now_s)

    def _finished(self, event: ev.Finished, out: list[ev.Command]) -> None:
        sample = self._samples.get(event.sample_id)
        if sample is None or not _is_on(event.instance, sample):
            return
        sample.response_tokens = event.response_tokens
        self._fleet.reached(event.instance, sample.id, event.response_tokens, event.now_s)
        self._fleet.remove(sample)
        sample.move(S.FINISHED)
        self._ended([sample], [sample.id], [event.response_tokens], out)

    def _completed(self, event: ev.Completed, out: list[ev.Command]) -> None:
        ids, tokens = event.sample_ids, event.response_tokens
        samples = [self._samples[sample_id] for sample_id in ids]
        for sample, number in zip(samples, tokens, strict=True):
            sample.response_tokens = number
            sample.move(S.FINISHED)
        self._fleet.finished(ids, event.instances, tokens, event.times)
        self._ended(samples, ids, tokens, out)

    def _ended(
        self, samples: list[Sample], ids: list[int], tokens: list[int], out: list[ev.Command]
    ) -> None:
        """These samples are FINISHED, in this order."""
        self._num_generating -= len(ids)
        self.lengths.observe_all(tokens, samples)
        self._completion.finished(samples, ids, tokens, out)

    def _scored(self, event: ev.Scored, out: list[ev.Command]) -> None:
        self._fleet.answered(event.worker, event.role, event.sample_ids)
        self._completion.scored(event.worker, event.role, event.sample_ids, out)

    def _trained(self, event: ev.Trained) -> None:
        self._fleet.answered(event.worker, TRAIN, event.sample_ids)
        self._completion.trained(event.worker, event.sample_ids)

    def _left(self, event: ev.Left) -> None:
        sample = self._samples.get(event.sample_id)
        if sample is None or sample.state is not S.MOVING or sample.instance != event.instance:
            return
        sample.response_tokens = event.response_tokens
        expected = self.lengths.expected_tokens(sample)
        destination = self._fleet.arrive(sample, expected, self._now_s)
        if destination >= 0:
            sample.move(S.RUNNING, destination)
        else:
            self._fleet.remove(sample)
            self._requeue(sample)

    def _requeue(self, sample: Sample) -> None:
        sample.move(S.QUEUED)
        self._queue.appendleft(sample.id)

    def _dropped(self, sample_id: int, reason: str, out: list[ev.Command]) -> None:
        sample = self._samples.get(sample_id)
        if sample is None or sample.state is S.DROPPED:
            return
        if sample.state is S.SCORED and self._groups.is_trained(sample):
            return  # too late: its gradient is in
        if sample.state is S.QUEUED:
            self._queue.remove(sample.id)
        self._fleet.remove(sample)
        self._num_generating -= sample.state in (S.QUEUED, S.RUNNING, S.MOVING)
        self._completion.drop(sample, reason, out)

    def _timed_out(self, sample_id: int, out: list[ev.Command]) -> None:
        """The reward is asked for again, or the sample dropped when that was tried enough."""
        times = self._rewards.timed_out(sample_id)
        if times:
            self._dropped(sample_id, f"its reward timed out ({times} times asked)", out)

    def _lost(self, event: ev.InstanceLost) -> None:
        instance = event.instance
        if not self._fleet.workers[instance].alive:
            return
        for sample_id in self._fleet.lose(instance):
            sample = self._samples[sample_id]
            self._fleet.remove(sample)
            self._requeue(sample)
        if not event.trains_on:
            self._groups.lose(instance)
        self._completion.lost(instance)

    # --- decisions -------------------------------------------------------------------------

    def _advance(self, out: list[ev.Command]) -> None:
        if self._queue:
            self._dispatch(out)
        elif (
            self._fused
            and self._num_generating
            and self._tail_watch.due(self._now_s, self._num_generating)
        ):
            self._weigh_tail(out)
        if self._fused or not self._num_generating:
            if self._rewards.wanted:
                out.append(ev.Reward(self._rewards.ask()))
            pending = self._board.num_pending or self._groups.pending
            if pending and (self._fleet.ready.place or not self._fused):
                self._inference.advance(out, self._fused, self._completion.num_open)

    def _dispatch(self, out: list[ev.Command]) -> None:
        given = dispatch(
            self._queue, self._samples, self._fleet, self.lengths, self.policy,
            self._now_s, self._first,
        )  # fmt: skip
        for instance in sorted(given):
            out += wake(self._fleet, instance)
            out.append(ev.Generate(instance, tuple(given[instance])))

    def _weigh_tail(self, out: list[ev.Command]) -> None:
        found = self._tail_watch.weigh()
        if found is not None:
            tail, move = found
            out += carry_out(tail, move, self._samples, self._fleet, self.cost, self.policy)

    # --- invariants ------------------------------------------------------------------------

    def validate(self) -> None:
        """Assert that the books agree. O(samples): for tests and the end of an iteration."""
        states = [s.state for s in self._samples.values()]
        open_states = (S.QUEUED, S.RUNNING, S.MOVING)
        assert self._num_generating == sum(s in open_states for s in states)
        queued = {i for i, s in self._samples.items() if s.state is S.QUEUED}
        assert queued == set(self._queue)
        assert len(queued) == len(self._queue)
        self._fleet.validate(self._samples)
        self._completion.validate()


def _is_on(instance: int, sample: Sample) -> bool:
    return sample.instance == instance and sample.state in GENERATING
