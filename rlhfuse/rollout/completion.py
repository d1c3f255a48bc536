"""From the end of a response to SCORED: which scores and rewards samples wait for, and which groups
they complete."""

from collections.abc import Iterable, Mapping, Sequence

from rlhfuse.rollout import events as ev
from rlhfuse.rollout.groups import Groups
from rlhfuse.rollout.reward_ledger import RewardLedger
from rlhfuse.rollout.scoring import ScoreBoard
from rlhfuse.sample import Sample, SampleState

S = SampleState


class Completion:
    """The samples of one iteration as their scores, rewards and gradients come in, or are lost.
    `num_open`: samples that are neither SCORED nor DROPPED."""

    def __init__(
        self,
        samples: Mapping[int, Sample],
        board: ScoreBoard,
        groups: Groups,
        rewards: RewardLedger,
        *,
        function_reward: bool,
    ) -> None:
        self._samples = samples
        self._board = board
        self._groups = groups
        self._rewards = rewards
        self._function_reward = function_reward
        self.num_open = len(samples)

    def finished(
        self, samples: list[Sample], ids: list[int], tokens: list[int], out: list[ev.Command]
    ) -> None:
        """These samples are FINISHED, in this order."""
        complete = self._board.add(ids, [sample.total_tokens for sample in samples])
        if self._groups.members:
            for sample in samples:
                self._groups.finished(sample)
        if self._function_reward:
            self._rewards.want(ids)
        else:
            self._settle(complete, out)

    def scored(
        self, worker: int, role: str, sample_ids: tuple[int, ...], out: list[ev.Command]
    ) -> None:
        self._settle(self._board.done(worker, role, sample_ids), out)

    def rewarded(self, sample_id: int, out: list[ev.Command]) -> None:
        self._rewards.forget(sample_id)
        if sample_id in self._samples and self._board.complete(sample_id):
            self._settle((sample_id,), out)

    def _settle(self, sample_ids: Iterable[int], out: list[ev.Command]) -> None:
        """FINISHED -> SCORED, of samples that have all scores, when their rewards are there."""
        samples, grouped = self._samples, bool(self._groups.members)
        for sample_id in sample_ids:
            sample = samples[sample_id]
            waits = self._function_reward and self._rewards.outstanding(sample_id)
            if sample.state is S.FINISHED and not waits:
                sample.move(S.SCORED)
                self.num_open -= 1
                if grouped:
                    self._close(sample, out)

    def _close(self, sample: Sample, out: list[ev.Command]) -> None:
        if not self._groups.members:
            return
        complete = self._groups.close(sample)
        if complete:
            out.append(ev.Release(sample.group, complete))

    def trained(self, worker: int, sample_ids: Sequence[int]) -> None:
        """The gradients of a group are summed up."""
        first = self._samples.get(sample_ids[0])
        if first is None or not self._groups.done(worker, first.group):
            return
        group = first.group
        for sample in self._groups.members[group]:  # scores lost meanwhile are not needed again
            self._board.forget(sample.id)
            if sample.state is S.FINISHED:
                self._rewards.forget(sample.id)
                sample.move(S.SCORED)
                self.num_open -= 1
                self._groups.open_members[group] -= 1

    def lost(self, worker: int) -> None:
        """The scores that the worker held or was at are needed again."""
        for sample_id in sorted(self._board.lose(worker)):
            sample = self._samples[sample_id]
            if sample.state is S.SCORED:
                sample.move(S.FINISHED)
                self.num_open += 1
                if self._groups.members:
                    self._groups.reopen(sample)

    def drop(self, sample: Sample, reason: str, out: list[ev.Command]) -> None:
        """Whatever state it is in, nothing is waited for."""
        was_scored, had_ended = sample.state is S.SCORED, sample.state in (S.FINISHED, S.SCORED)
        self.num_open -= not was_scored
        self._board.forget(sample.id)
        self._rewards.forget(sample.id)
        sample.drop_reason = reason
        sample.move(S.DROPPED)
        if had_ended and self._groups.members:
            self._groups.dropped(sample)
        if was_scored and self._groups.members:
            released = self._groups.dropped_late(sample)
            if released:
                out.append(ev.Release(sample.group, released))
        else:
            self._close(sample, out)

    def validate(self) -> None:
        """Assert that the books agree with the samples."""
        samples = self._samples
        assert self.num_open == sum(s.state not in (S.SCORED, S.DROPPED) for s in samples.values())
        self._groups.validate(samples)
        self._rewards.validate(samples)
        trained = self._groups.trained
        finished = {
            i
            for i, s in samples.items()
            if s.state in (S.FINISHED, S.SCORED) and s.group not in trained
        }
        self._board.validate(finished)
        for sample in samples.values():
            if sample.state is S.SCORED and sample.group not in trained:
                assert self._board.complete(sample.id)
