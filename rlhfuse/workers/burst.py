"""Engine steps as they are reported: many short ones as one span."""

from rlhfuse.timeline import Kind, Span


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
