"""What has come of a batch so far: counted for the result, and shown while it runs."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from rlhfuse.progress import Progress
from rlhfuse.rollout.records import Record, RolloutResult

_SHOWN_EVERY_S = 0.2


@dataclass(slots=True)
class Tally:
    """Counts and moments of one batch (`time.monotonic` seconds; 0: not yet).

    `rescued`: samples that were running on instances when these were lost; `prefilled_again`:
    their tokens. `trained_ahead`: groups that were trained when the last response was there.
    """

    start_s: float = 0.0
    generated_at_s: float = 0.0
    done_at_s: float = 0.0
    finished: int = 0
    scored: int = 0
    moved: int = 0
    tokens: int = 0
    lost: int = 0
    rescued: int = 0
    prefilled_again: int = 0
    trained_ahead: int = 0

    def all_scored(self, yes: bool) -> None:
        """Whether the last score is there now; it may die again."""
        if not yes:
            self.done_at_s = 0.0
        elif not self.done_at_s:
            self.done_at_s = time.monotonic()

    def rescue(self, record: Record) -> None:
        """A sample goes on elsewhere, from the tokens that are known of it."""
        self.rescued += 1
        self.prefilled_again += len(record.prompt) + len(record.response) // 4

    def result(
        self, records: Iterable[Record], decisions: Iterable[str], trained: Iterable[int]
    ) -> RolloutResult:
        return RolloutResult(
            records=tuple(records),
            generated_s=self.generated_at_s - self.start_s,
            done_s=self.done_at_s - self.start_s,
            moved=self.moved,
            decisions=tuple(decisions),
            instances_lost=self.lost,
            samples_rescued=self.rescued,
            tokens_prefilled_again=self.prefilled_again,
            trained=frozenset(trained),
            trained_ahead=self.trained_ahead,
        )


class Display:
    """Shows a tally, not more often than a reader can follow."""

    def __init__(self, progress: Progress, samples: int, groups: int, scores: int) -> None:
        """`scores`: how many the samples need of all models together."""
        self._progress = progress
        self._samples = samples
        self._groups = groups
        self._scores = scores
        self._shown_s = 0.0

    def show(self, tally: Tally, groups_trained: int) -> None:
        now = time.monotonic()
        if now - self._shown_s < _SHOWN_EVERY_S:
            return
        self._shown_s = now
        self._progress.generation(tally.finished, self._samples, tally.tokens, tally.moved)
        if tally.scored:
            self._progress.scoring(tally.scored, self._scores)
        if groups_trained:
            self._progress.groups(groups_trained, self._groups)
