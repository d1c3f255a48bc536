"""What several ranks hold alike in a `FusedStep`: replicas of a stage, both ends' tied matrix.

A replica's sums start to travel when its last task on this rank is done, while the rank goes on
with other models: reduction hides in what would be bubbles.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from rlhfuse.schedules.ir import Op, Schedule, Task
from rlhfuse.training.fused_models import Model
from rlhfuse.training.gradients import GradientSums
from rlhfuse.training.reduction import Key, Reductions

Stages = Mapping[str, Mapping[int, tuple[nn.Parameter, ...]]]


class Alike:
    """The groups of one rank. All ranks make one alike."""

    def __init__(
        self,
        models: Sequence[Model],
        rank: int,
        trained: Stages,
        sums: Mapping[str, GradientSums],
        timeout: timedelta,
    ) -> None:
        """Collective: all ranks make all groups, as torch requires. `trained`: what this rank
        trains, by model and stage."""
        self._models = {model.name: model for model in models}
        self._trained = trained
        self._sums = sums
        self._rank = rank
        self._reductions = Reductions()
        self._left: dict[str, int] = {}
        self._replicas: dict[Key, dist.ProcessGroup] = {}
        self._ends: dict[str, dist.ProcessGroup] = {}
        for model in models:
            like = [m for m in models if m.replica_of == model.name]
            for stage, home in enumerate(model.ranks) if like else ():
                ranks = sorted((home, *(m.ranks[stage] for m in like)))
                group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    self._replicas[model.name, stage] = group
            ends = sorted({model.ranks[0], model.ranks[-1]})
            if model.tied is not None and len(ends) == 2:
                group = dist.new_group(ends, timeout=timeout)
                if rank in ends:
                    self._ends[model.name] = group

    def begin(self, schedule: Schedule) -> None:
        """The tasks of `schedule` come next."""
        self._left = {}
        for task in schedule.rows[self._rank] if self._replicas else ():
            if task.op in (Op.B, Op.W):
                self._left[task.pipeline] = self._left.get(task.pipeline, 0) + 1

    def done(self, task: Task) -> None:
        """A task is complete; gradients that are complete with it start to travel."""
        name = task.pipeline
        if name not in self._left or task.op not in (Op.B, Op.W):
            return
        self._left[name] -= 1
        if self._left[name]:
            return
        family = self._models[name].family
        for stage, parameters in self._trained[name].items():
            if parameters and (family, stage) in self._replicas:
                gradients = [self._sum(name, p) for p in parameters]
                self._reductions.start((name, stage), gradients, self._replicas[family, stage])

    def finish(self, names: Sequence[str]) -> None:
        """Of these models: wait until all gradients are sums over whoever holds them alike.
        Collective."""
        for name in names:
            for stage in self._trained.get(name, ()):
                self._reductions.finish((name, stage))
        for name in names:
            for tied in self._tied(name).values():
                dist.all_reduce(self._sum(name, tied), group=self._ends[name])

    def counted(self, name: str) -> list[nn.Parameter]:
        """What the model trains on this rank and no other counts in its norm."""
        model = self._models[name]
        if model.replica_of is not None:
            return []
        copied = self._tied(name).get(len(model.ranks) - 1)
        mine = self._trained.get(name, {}).values()
        return [p for parameters in mine for p in parameters if p is not copied]

    def close(self) -> None:
        """Leave the groups."""
        self._reductions.clear()
        for groups in (self._replicas, self._ends):
            while groups:
                dist.destroy_process_group(groups.popitem()[1])

    def _tied(self, name: str) -> dict[int, nn.Parameter]:
        """This rank's ends of a matrix whose other end is on another rank, by stage."""
        model = self._models[name]
        if model.tied is None or name not in self._ends:
            return {}
        ends = (0, len(model.ranks) - 1)
        found = {s: model.tied(model.stages[s]) for s in ends if s in model.stages}
        return {stage: tied for stage, tied in found.items() if tied.requires_grad}

    @torch.no_grad()
    def _sum(self, name: str, parameter: nn.Parameter) -> torch.Tensor:
        """Of its gradients; zeros where it got none, as others may have."""
        sums = self._sums[name]
        found = sums.of(parameter)
        if found is None:
            sums.add(parameter, torch.zeros_like(parameter))
            found = sums.of(parameter)
        assert found is not None
        return found
