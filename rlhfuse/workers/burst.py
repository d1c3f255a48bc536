"""Engine steps as they are reported: many short ones as one span, and what samples cost that come
in apart from it."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from rlhfuse.timeline import Kind, Span

_MEMORY = 0.2  # weight of the newest step in the mean that a step with newcomers is compared with


@dataclass(frozen=True, slots=True)
class Newcomer:
    """A sample before its first step here: tokens to compute, or to take from its cache."""

    tokens: int
    cached: bool


class Burst:
    """Consecutive engine steps, reported as one span."""

    def __init__(self) -> None:
        self.steps = 0
        self._rows = 0
        self._context_tokens = 0
        self._start_s = 0.0
        self._end_s = 0.0

    def add(self, start_s: float, end_s: float, batch: int, context_tokens: int) -> None:
        """One more step, over `batch` samples that hold `context_tokens` in all."""
        if not self.steps:
            self._start_s = start_s
        self._end_s = end_s
        self._rows += batch
        self._context_tokens += context_tokens
        self.steps += 1

    def span(self, lane: str) -> Span:
        """All steps since the first, with their mean batch and context."""
        batch = self._rows / self.steps
        args: dict[str, int | float | str] = {
            "steps": self.steps,
            "batch": round(batch, 2),
            "context_tokens": round(self._context_tokens / self.steps, 1),
        }
        return Span(lane, self._start_s, self._end_s, Kind.GENERATE, f"generate x{batch:.0f}", args)


class StepMeter:
    """What the steps of an engine took.

    A step in which samples draw their first token here lasts longer than its neighbours: the rest
    is what it took to compute their prefixes, or to take in their caches.
    """

    def __init__(self, lane: str) -> None:
        self._lane = lane
        self._burst = Burst()
        self._newcomers: dict[int, Newcomer] = {}
        self._plain_s = 0.0  # seconds per step without newcomers, lately
        self._near_ties, self._exact_s = 0, 0.0  # of steps that are in no closed burst

    @property
    def steps(self) -> int:
        """Steps since the last `close`."""
        return self._burst.steps

    def enters(self, sample_id: int, newcomer: Newcomer) -> None:
        """A sample was given to the engine."""
        self._newcomers[sample_id] = newcomer

    def clear(self) -> None:
        """Nothing runs, and what was measured is of no more use."""
        self._burst = Burst()
        self._near_ties, self._exact_s = 0, 0.0
        self._newcomers.clear()

    def close(self) -> list[Span]:
        """The burst so far, if there is one, as a span."""
        if not self._burst.steps:
            return []
        burst, self._burst = self._burst, Burst()
        span = burst.span(self._lane)
        if self._near_ties:
            exact = {"near_ties": self._near_ties, "exact_s": round(self._exact_s, 6)}
            span = msgspec.structs.replace(span, args={**span.args, **exact})
            self._near_ties, self._exact_s = 0, 0.0
        return [span]

    def decided(self, near_ties: int, exact_s: float) -> None:
        """Near ties that the coming `add`'s step decided, and the seconds that took."""
        self._near_ties += near_ties
        self._exact_s += exact_s

    def add(self, start_s: float, end_s: float, contexts: Mapping[int, int]) -> list[Span]:
        """A step from which the samples in `contexts` gained a token; their tokens in all. Returns
        spans that are complete."""
        new = [self._newcomers.pop(i) for i in contexts if i in self._newcomers]
        context_tokens = sum(contexts.values())
        if not new:
            seconds = end_s - start_s
            known = self._plain_s or seconds
            self._plain_s = known + _MEMORY * (seconds - known)
            self._burst.add(start_s, end_s, len(contexts), context_tokens)
            return []
        spans = self.close()
        stayed = len(contexts) - len(new)
        alone_s = min(self._plain_s, end_s - start_s) if stayed else 0.0
        spans.append(self._entry(new, start_s, end_s - alone_s))
        if stayed:
            self._burst.add(end_s - alone_s, end_s, stayed, context_tokens)
        return spans

    def _entry(self, new: list[Newcomer], start_s: float, end_s: float) -> Span:
        computed = sum(one.tokens for one in new if not one.cached)
        moved = sum(one.tokens for one in new if one.cached)
        if computed:  # beside which taking in a cache is little
            args: dict[str, int | float | str] = {"tokens": computed, "samples": len(new)}
            return Span(self._lane, start_s, end_s, Kind.PREFILL, "prefill", args)
        args = {"tokens": moved, "samples": len(new)}
        return Span(self._lane, start_s, end_s, Kind.MIGRATE, "take in", args)
