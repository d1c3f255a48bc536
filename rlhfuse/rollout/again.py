"""Finished samples that are generated again: the loss needs what died with their worker."""

from collections.abc import Iterable, Iterator, Sequence

from rlhfuse import messages as m
from rlhfuse.rollout.records import Record


class Again:
    """Samples under way for the second time, from their first token; the tokens must be the
    same, and only the log-probabilities are kept."""

    def __init__(self) -> None:
        self._runs: dict[int, tuple[int, bytearray]] = {}  # sample -> instance, tokens

    def __contains__(self, sample_id: int) -> bool:
        return sample_id in self._runs

    def __str__(self) -> str:
        ids = ", ".join(map(str, sorted(self._runs)))
        return f"log-probabilities of samples {ids}" if ids else ""

    def begin(
        self, records: Iterable[Record], instances: Sequence[int]
    ) -> Iterator[tuple[int, tuple[m.GenerateItem, ...]]]:
        """What each instance is to generate, of the records that nobody is at yet."""
        idle = [record for record in records if record.sample_id not in self]
        for number, instance in enumerate(instances):
            mine = idle[number :: len(instances)]
            self._runs.update({record.sample_id: (instance, bytearray()) for record in mine})
            if mine:
                yield instance, tuple(record.from_the_start() for record in mine)

    def take(self, record: Record, growth: m.Growth) -> bool:
        """Compare new tokens; whether the sample is complete."""
        _, tokens = self._runs[record.sample_id]
        tokens.extend(growth.tokens)
        assert record.response.startswith(tokens), (
            f"sample {record.sample_id}: generated again, its tokens differ"
        )
        if growth.finish_reason:
            del self._runs[record.sample_id]
        return bool(growth.finish_reason)

    def lose(self, instance: int) -> None:
        """What ran there must begin anew."""
        for sample_id in [i for i, (home, _) in self._runs.items() if home == instance]:
            del self._runs[sample_id]
