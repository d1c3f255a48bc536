"""Data-parallel replicas: their gradients become one sum, their parameters stay the same bits.

A stage's sums start to travel as soon as its last micro-batch is done, while the rank goes on with
the other model's tasks: reduction hides in what would be bubbles.
"""

from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhfuse.placement import StagePlacement, replicas, roles_of
from rlhfuse.training.reduction import Key, Reductions, buckets, copy_back, flattened
from rlhfuse.training.trained_stage import TrainedStage


class Replicas:
    """The replicas of one rank's stages. All ranks make one at the same time."""

    def __init__(
        self, pipelines: Mapping[str, StagePlacement], rank: int, timeout: timedelta
    ) -> None:
        """Collective. Groups are the ranks that hold the same stage of the same role."""
        self._groups: dict[Key, tuple[list[int], dist.ProcessGroup]] = {}
        self._reductions = Reductions()
        for role in sorted(roles_of(pipelines)):
            names = replicas(pipelines, role)
            for stage in range(len(pipelines[role].ranks)) if len(names) > 1 else ():
                ranks = [pipelines[name].ranks[stage] for name in names]
                group = dist.new_group(ranks, timeout=timeout)
                if rank in ranks:
                    self._groups[role, stage] = (ranks, group)

    def start(self, stage: TrainedStage) -> None:
        """The stage's gradients are complete on this rank: begin to sum them over replicas."""
        key = (stage.role, stage.pp_stage)
        if key in self._groups:
            self._reductions.start(key, _gradients(stage), self._groups[key][1])

    def finish(self, stage: TrainedStage) -> None:
        """Wait until the stage's gradients are the sums of all replicas."""
        self._reductions.finish((stage.role, stage.pp_stage))

    @torch.no_grad()
    def share(self, stage: TrainedStage) -> None:
        """After the optimizer's step: each shard's owner gives its new parameters to the others."""
        if stage.num_shards == 1:
            return
        ranks, group = self._groups[stage.role, stage.pp_stage]
        parameters = stage.trained_parameters()
        for owner, names in enumerate(stage.optimizer.shards):
            for part in buckets([parameters[name] for name in names]):
                flat = flattened(part)
                dist.broadcast(flat, ranks[owner], group=group)
                copy_back(flat, part)

    def close(self) -> None:
        """Leave the groups."""
        self._reductions.clear()
        while self._groups:
            dist.destroy_process_group(self._groups.popitem()[1][1])


def _gradients(stage: TrainedStage) -> list[torch.Tensor]:
    found = []
    for name, parameter in stage.trained_parameters().items():
        gradient = stage.sums.of(parameter)
        assert gradient is not None, f"{stage.pipeline} stage {stage.pp_stage}: {name} got none"
        found.append(gradient)
    return found
