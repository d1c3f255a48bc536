"""Which finished samples wait for the reward function, and how often it was asked."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rlhfuse.sample import Sample, SampleState


@dataclass(slots=True)
class RewardLedger:
    """A sample is wanted (to be asked for) or asked (with the number of times); else answered, or
    nothing is needed."""

    tries: int
    wanted: dict[int, int] = field(default_factory=dict)  # sample -> times asked before
    asked: dict[int, int] = field(default_factory=dict)

    def want(self, sample_ids: Iterable[int]) -> None:
        self.wanted.update(dict.fromkeys(sample_ids, 0))

    def ask(self) -> tuple[int, ...]:
        """All that is wanted is asked for."""
        ids = tuple(sorted(self.wanted))
        for sample_id in ids:
            self.asked[sample_id] = self.wanted[sample_id] + 1
        self.wanted.clear()
        return ids

    def outstanding(self, sample_id: int) -> bool:
        return sample_id in self.wanted or sample_id in self.asked

    def forget(self, sample_id: int) -> None:
        """Answered, or not needed any more."""
        self.wanted.pop(sample_id, None)
        self.asked.pop(sample_id, None)

    def timed_out(self, sample_id: int) -> int:
        """How often it was asked if that was often enough; 0: it is asked again, or a stray."""
        if sample_id not in self.asked:
            return 0
        times = self.asked.pop(sample_id)
        if times >= self.tries:
            return times
        self.wanted[sample_id] = times
        return 0

    def validate(self, samples: Mapping[int, Sample]) -> None:
        """Assert that only finished samples wait, each once."""
        assert not self.wanted.keys() & self.asked.keys()
        for sample_id in (*self.wanted, *self.asked):
            assert samples[sample_id].state is SampleState.FINISHED, f"sample {sample_id}"
