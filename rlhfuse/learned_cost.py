"""A cost model that follows a run."""

from collections import deque

from rlhfuse.cost import CostModel, fit
from rlhfuse.timeline import Kind, Span, Timeline

_REMEMBERED = 96  # migrations and prefills of earlier steps


class LearnedCost:
    """A cost model that improves with every step. Of what a step shows seldom, migrations and
    prefills, the last `_REMEMBERED` are fitted again each time."""

    def __init__(self, model: CostModel) -> None:
        self.model = model
        self._seldom: deque[Span] = deque(maxlen=_REMEMBERED)

    def learn(self, timeline: Timeline) -> None:
        """Better predictions from a step's measured spans."""
        again = tuple(self._seldom)
        self.model = fit(Timeline((*timeline.spans, *again)), self.model)
        self._seldom.extend(s for s in timeline.spans if s.kind in (Kind.MIGRATE, Kind.PREFILL))
