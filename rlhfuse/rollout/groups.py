"""Groups of siblings: complete when all their samples are scored or dropped; then trained, once."""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from rlhfuse.cost import CostModel
from rlhfuse.sample import Sample, SampleState
from rlhfuse.update_plan import StageCosts

CLOSED = (SampleState.SCORED, SampleState.DROPPED)
FINISHED = (SampleState.FINISHED, SampleState.SCORED)
TRAIN = "train"  # the role, in rates and calls, of forward and backward of a group


def with_training(model: CostModel, actor: StageCosts) -> CostModel:
    """The cost model, which also knows what a group's forward and backward take on one device."""
    train_s = sum(actor.forward) + sum(actor.backward)
    return replace(model, score_token_s={**model.score_token_s, TRAIN: train_s})


@dataclass(slots=True)
class Groups:
    """`open_members`: samples of a group that are neither SCORED nor DROPPED. A complete group is
    pending (to be trained), out (a worker is at it) or trained; without training, only complete.
    `tokens`: of a group's finished samples, scored or not; `untrained_tokens`: of all groups that
    are neither out nor trained, complete or not.
    """

    train: bool
    members: dict[int, list[Sample]] = field(default_factory=dict)
    open_members: dict[int, int] = field(default_factory=dict)
    pending: dict[int, int] = field(default_factory=dict)  # group -> tokens
    pending_tokens: int = 0
    tokens: dict[int, int] = field(default_factory=dict)
    untrained_tokens: int = 0
    out: dict[int, int] = field(default_factory=dict)  # group -> worker
    trained: set[int] = field(default_factory=set)
    _largest: list[tuple[int, int]] = field(default_factory=list)  # heap; of pending ones and past

    def begin(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            self.members.setdefault(sample.group, []).append(sample)
            self.open_members[sample.group] = self.open_members.get(sample.group, 0) + 1

    @property
    def all_trained(self) -> bool:
        return not self.pending and not self.out

    def is_trained(self, sample: Sample) -> bool:
        """Whether the sample's gradient is computed, or being computed."""
        return sample.group in self.trained or sample.group in self.out

    def finished(self, sample: Sample) -> None:
        """The sample's response is complete."""
        self._count(sample, sample.total_tokens)

    def dropped(self, sample: Sample) -> None:
        """A finished sample will not be trained on."""
        self._count(sample, -sample.total_tokens)

    def _count(self, sample: Sample, tokens: int) -> None:
        self.tokens[sample.group] = self.tokens.get(sample.group, 0) + tokens
        if not self.is_trained(sample):
            self.untrained_tokens += tokens

    def close(self, sample: Sample) -> tuple[int, ...]:
        """The sample is SCORED or DROPPED; returns the group's scored samples if it is complete."""
        group = sample.group
        self.open_members[group] -= 1
        return self._complete(group)

    def dropped_late(self, sample: Sample) -> tuple[int, ...]:
        """A SCORED sample of a complete or open group was dropped after all."""
        self._withdraw(sample.group)
        return self._complete(sample.group)

    def reopen(self, sample: Sample) -> None:
        """The sample's scores were lost."""
        self.open_members[sample.group] += 1
        self._withdraw(sample.group)

    def _complete(self, group: int) -> tuple[int, ...]:
        if self.open_members[group]:
            return ()
        scored = [s for s in self.members[group] if s.state is SampleState.SCORED]
        if scored and self.train and group not in self.trained and group not in self.out:
            tokens = sum(s.total_tokens for s in scored)
            self.pending[group] = tokens
            self.pending_tokens += tokens
            heapq.heappush(self._largest, (-tokens, group))
        return tuple(s.id for s in scored)

    def _withdraw(self, group: int) -> None:
        self.pending_tokens -= self.pending.pop(group, 0)

    def take(self, worker: int) -> tuple[tuple[int, ...], int]:
        """The largest complete group, now out: (sample ids, tokens). A large one that were left
        to the end would be waited for by all."""
        tokens = group = -1
        while self.pending.get(group) != tokens:
            negative, group = heapq.heappop(self._largest)
            tokens = -negative
        del self.pending[group]
        self.pending_tokens -= tokens
        self.untrained_tokens -= self.tokens[group]
        self.out[group] = worker
        scored = (s.id for s in self.members[group] if s.state is SampleState.SCORED)
        return tuple(scored), tokens

    def done(self, worker: int, group: int) -> bool:
        """The worker has trained the group; False for a stray report."""
        if self.out.get(group) != worker:
            return False
        del self.out[group]
        self.trained.add(group)
        return True

    def lose(self, worker: int) -> None:
        """What the worker was training has to be trained again."""
        for group in [g for g, w in self.out.items() if w == worker]:
            self.give_back(worker, group)

    def give_back(self, worker: int, group: int) -> None:
        """The worker has not trained the group."""
        if self.out.get(group) != worker:
            return
        del self.out[group]
        self.untrained_tokens += self.tokens[group]
        if not self.open_members[group]:
            self._complete(group)

    def validate(self, samples: Mapping[int, Sample]) -> None:
        """Assert that groups and samples tell the same story."""
        seen = counted = 0
        for group, members in self.members.items():
            seen += len(members)
            is_open = sum(s.state not in CLOSED for s in members)
            assert self.open_members[group] == is_open, f"group {group}"
            scored = any(s.state is SampleState.SCORED for s in members)
            places = (group in self.pending) + (group in self.out) + (group in self.trained)
            assert places <= 1, f"group {group} stands in two places"
            if self.train and not is_open and scored:
                assert places == 1, f"group {group} is complete and nowhere"
            tokens = sum(s.total_tokens for s in members if s.state in FINISHED)
            assert self.tokens.get(group, 0) == tokens, f"group {group} has {tokens} tokens"
            counted += 0 if group in self.out or group in self.trained else tokens
        assert seen in (0, len(samples))
        assert self.untrained_tokens == counted
        assert self.pending_tokens == sum(self.pending.values())
