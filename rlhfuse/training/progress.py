"""How far one rank's update is, told a few times a second."""

import time
from collections.abc import Callable, Mapping, Sequence

from rlhfuse.schedules.ir import Op, Task
from rlhfuse.training.records import MiniBatchPlan

INTERVAL_S = 0.25

Tell = Callable[[int, int, Mapping[str, float]], None]
"""Called with (micro-batches done, in all, losses of the last mini-batch by role)."""


class UpdateProgress:
    """Counts micro-batches whose gradients are complete on the stages of one rank."""

    def __init__(
        self, total: int, tell: Tell | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`total`: micro-batches of all mini-batches and stages of this rank."""
        self._total = total
        self._tell = tell
        self._clock = clock
        self._told_s = clock()
        self._done = 0
        self._losses: Mapping[str, float] = {}

    @classmethod
    def of(
        cls, minibatches: Sequence[MiniBatchPlan], pipelines: Sequence[str], tell: Tell | None
    ) -> "UpdateProgress":
        """`pipelines`: of each stage of this rank."""
        counts = [len(b.microbatches.get(name, ())) for b in minibatches for name in pipelines]
        return cls(sum(counts), tell)

    def task_done(self, task: Task) -> None:
        """Every micro-batch of a stage ends with exactly one `B` or one `W`."""
        if task.op in (Op.B, Op.W):
            self._done += 1
            self._say_if_due()

    def minibatch_done(self, losses: Mapping[str, float]) -> None:
        """The losses of a mini-batch are known; they go out with the next word."""
        self._losses = losses
        self._say_if_due()

    def _say_if_due(self) -> None:
        now_s = self._clock()
        if self._tell is not None and now_s - self._told_s >= INTERVAL_S:
            self._told_s = now_s
            self._tell(self._done, self._total, self._losses)
