"""Complete groups on their way to the training workers, while others are still generated."""

import time
from collections.abc import Callable, Iterator, Sequence

from rlhfuse import messages as m
from rlhfuse.rollout import events as ev
from rlhfuse.rollout.records import Record

PlanGroup = Callable[[Sequence[Record], int], m.TrainGroup]
"""A complete group, on the replica of a device."""


class Ahead:
    """Which groups of a batch are trained, and which wait. `trained`: samples whose gradients are
    summed up."""

    def __init__(self, plan: PlanGroup | None, *, needs_logprobs: bool) -> None:
        """`needs_logprobs`: without the engine's log-probabilities a group cannot be trained."""
        self._plan = plan
        self._needs_logprobs = needs_logprobs
        self._held: list[ev.Train] = []
        self.trained: set[int] = set()

    @property
    def awaited(self) -> set[int]:
        """Samples of groups that wait for log-probabilities to be made again."""
        return {i for command in self._held for i in command.sample_ids}

    def order(self, command: ev.Train, group: Sequence[Record]) -> m.TrainGroup | None:
        """What to tell the device's training worker; nothing where the group has to wait."""
        assert self._plan is not None, "a group is to be trained, and nobody said how"
        if self._needs_logprobs and not all(record.rollout_endpoint for record in group):
            self._held.append(command)
            return None
        return self._plan(group, command.worker)

    def take_held(self) -> Iterator[ev.Train]:
        """Groups that waited, to be looked at again."""
        held, self._held = self._held, []
        yield from held

    def heard(self, device: int, event: m.GroupTrained) -> ev.Event:
        """What the scheduler is to know."""
        now = time.monotonic()
        if event.missing:
            return ev.NotTrained(now, device, event.sample_ids)
        self.trained.update(event.sample_ids)
        return ev.Trained(now, device, event.sample_ids)
