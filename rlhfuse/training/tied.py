"""Tied embeddings: one matrix on a pipeline's first and last stage, with one gradient."""

from collections.abc import Mapping
from datetime import timedelta

import torch.distributed as dist

from rlhfuse.placement import StagePlacement
from rlhfuse.training.trained_stage import TrainedStage


class TiedEmbeddings:
    """The pairs of ranks that hold both ends of a pipeline. All ranks make one alike."""

    def __init__(
        self, pipelines: Mapping[str, StagePlacement], rank: int, timeout: timedelta
    ) -> None:
        """Collective: all ranks make all groups, as torch requires."""
        self._groups: dict[str, dist.ProcessGroup] = {}
        for name, place in sorted(pipelines.items()):
            ends = sorted({place.ranks[0], place.ranks[-1]})
            if len(ends) == 2:
                group = dist.new_group(ends, timeout=timeout)
                if rank in ends:
                    self._groups[name] = group

    def sum_up(self, stage: TrainedStage) -> None:
        """Where `stage` holds a tied matrix, both ends get the sum of both gradients. Collective
        over both ends."""
        tied = stage.stage.tied_parameter
        if tied is None or not tied.requires_grad:
            return
        gradient = stage.sums.of(tied)
        assert gradient is not None, f"{stage.pipeline} stage {stage.pp_stage}: no gradient"
        dist.all_reduce(gradient, group=self._groups[stage.pipeline])

    def close(self) -> None:
        """Leave the groups."""
        while self._groups:
            dist.destroy_process_group(self._groups.popitem()[1])
