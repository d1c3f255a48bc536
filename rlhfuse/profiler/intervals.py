"""Half-open intervals of time: unions and cuts. Pure."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rlhfuse.timeline import Kind, Span

# Where spans of one lane overlap, the higher rank is what the lane was doing: computing beats
# moving bytes (only *exposed* transfers count), and both beat waiting. Equal ranks: the inner one.
_RANK = {
    Kind.WAIT: 0,
    Kind.OTHER: 0,
    Kind.TRANSFER: 1,
    Kind.WEIGHTS: 2,
    Kind.SWAP: 2,
    Kind.MIGRATE: 2,
    Kind.CHECKPOINT: 2,
}
_COMPUTE_RANK = 3


@dataclass(frozen=True, slots=True)
class Piece:
    """From `start_s` to `end_s` a lane was in `span`, or in none."""

    start_s: float
    end_s: float
    span: Span | None


class Union:
    """A union of intervals; says whether a moment is covered."""

    def __init__(self, intervals: Iterable[tuple[float, float]]) -> None:
        self.starts: list[float] = []
        self.ends: list[float] = []
        for start, end in sorted(intervals):
            if end <= start:
                continue
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(self.ends[-1], end)
            else:
                self.starts.append(start)
                self.ends.append(end)

    def covers(self, time_s: float) -> bool:
        index = bisect_right(self.starts, time_s) - 1
        return index >= 0 and time_s < self.ends[index]


def paint(spans: Sequence[Span], start_s: float, end_s: float) -> Iterator[Piece]:
    """Cut `start_s` to `end_s` into pieces with one span each, or none. Spans by start time.

    The pieces touch and cover the whole, so their durations add up to it.
    """
    now = start_s
    active: list[Span] = []
    top: Span | None
    for following in (*spans, None):
        target = min(following.start_s, end_s) if following is not None else end_s
        while now < target:
            active = [span for span in active if span.end_s > now]
            if len(active) == 1:  # by far the most usual: nothing overlaps
                top, until = active[0], min(active[0].end_s, target)
            elif active:
                top = max(active, key=_precedence)
                until = min(target, *(span.end_s for span in active))
            else:
                top, until = None, target
            yield Piece(now, until, top)
            now = until
        if following is not None:
            active.append(following)


def _precedence(span: Span) -> tuple[int, float, float]:
    return (_RANK.get(span.kind, _COMPUTE_RANK), span.start_s, -span.end_s)
