"""The floor under the executor: the same messages between the same sleeping ranks, and no more.

Receives are posted two ahead, as the executor does, or all at once before the first task; sends
are never waited for until the last. What it loses against the plan is gloo's, the timer's and the
processors', whoever calls them.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from rlhfuse.schedules.ir import Op, Schedule
from rlhfuse.training.links import Channel, Flow, plan_row

_Post = tuple[dist.ProcessGroup, int, int]  # group, place in it, tag


@dataclass(frozen=True, slots=True)
class _Step:
    seconds: float
    receives: Channel | None
    sends: _Post | None


class BareGloo:
    """One rank's row of a schedule of sleeping tasks."""

    def __init__(
        self,
        schedule: Schedule,
        rank: int,
        seconds: Mapping[Op, float],
        shape: Sequence[int],
        sleep: Callable[[float], None],
    ) -> None:
        """Makes a process group. Collective: all ranks call it alike."""
        self._group = dist.new_group(list(range(schedule.problem.num_ranks)))
        self._tags = {
            (pipe.name, flow): tag
            for tag, (pipe, flow) in enumerate(
                (pipe, flow) for pipe in schedule.problem.pipelines for flow in Flow
            )
        }
        self._message = torch.zeros(*shape)
        self._sleep = sleep
        plan = plan_row(schedule, rank)
        self._expected = {
            way: (len(order), self._post(way, way.source)) for way, order in plan.expected.items()
        }
        self._steps = [
            _Step(
                seconds[step.task.op],
                step.receives.channel if step.receives is not None else None,
                self._post(step.sends.channel, step.sends.channel.target)
                if step.sends is not None
                else None,
            )
            for step in plan.steps
        ]

    def _post(self, way: Channel, peer: int) -> _Post:
        return self._group, dist.get_group_rank(self._group, peer), self._tags[way[2:]]

    def run(self, ahead: int) -> tuple[float, float]:
        """When the first task began and the last one ended. `ahead`: receives posted at once."""
        left = {way: count for way, (count, _) in self._expected.items()}
        posted: dict[Channel, deque[tuple[torch.Tensor, dist.Work]]] = {w: deque() for w in left}

        def refill(way: Channel) -> None:
            group, source, tag = self._expected[way][1]
            while left[way] and len(posted[way]) < ahead:
                buffer = torch.empty_like(self._message)
                posted[way].append((buffer, group.recv([buffer], source, tag)))
                left[way] -= 1

        for way in left:
            refill(way)
        sent, moments = [], []
        for step in self._steps:
            if step.receives is not None:
                posted[step.receives].popleft()[1].wait()
            moments.append(time.monotonic())
            self._sleep(step.seconds)
            moments.append(time.monotonic())
            if step.sends is not None:
                group, target, tag = step.sends
                sent.append(group.send([self._message], target, tag))
            if step.receives is not None:
                refill(step.receives)
        for work in sent:
            work.wait()
        return moments[0], moments[-1]
