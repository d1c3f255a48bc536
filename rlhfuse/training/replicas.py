"""Data-parallel replicas: their gradients become one sum, their parameters stay the same bits.

A stage's sums start to travel as soon as its last micro-batch is done, while the rank goes on with
the other model's tasks: reduction hides in what would be bubbles.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from rlhfuse.placement import StagePlacement, replicas, roles_of
from rlhfuse.training.trained_stage import TrainedStage

BUCKET_BYTES = 64 * 1024 * 1024
Key = tuple[str, int]


@dataclass(slots=True)
class _Bucket:
    """Gradients that travel together, flattened."""

    gradients: list[torch.Tensor]
    flat: torch.Tensor
    work: dist.Work


class Replicas:
    """The replicas of one rank's stages. All ranks make one at the same time."""

    def __init__(
        self, pipelines: Mapping[str, StagePlacement], rank: int, timeout: timedelta
    ) -> None:
        """Collective. Groups are the ranks that hold the same stage of the same role."""
        self._groups: dict[Key, tuple[list[int], dist.ProcessGroup]] = {}
        self._travelling: dict[Key, list[_Bucket]] = {}
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
        if key not in self._groups:
            return
        assert key not in self._travelling, f"{key}: started twice"
        _, group = self._groups[key]
        self._travelling[key] = [
            _Bucket(part, flat, _work(dist.all_reduce(flat, group=group, async_op=True)))
            for part in _buckets(_gradients(stage))
            for flat in (torch.cat([g.reshape(-1) for g in part]),)
        ]

    @torch.no_grad()
    def finish(self, stage: TrainedStage) -> None:
        """Wait until the stage's gradients are the sums of all replicas."""
        for bucket in self._travelling.pop((stage.role, stage.pp_stage), []):
            bucket.work.wait()
            offset = 0
            for gradient in bucket.gradients:
                part = bucket.flat[offset : offset + gradient.numel()]
                gradient.copy_(part.view_as(gradient))
                offset += gradient.numel()

    @torch.no_grad()
    def share(self, stage: TrainedStage) -> None:
        """After the optimizer's step: each shard's owner gives its new parameters to the others."""
        if stage.num_shards == 1:
            return
        ranks, group = self._groups[stage.role, stage.pp_stage]
        parameters = stage.trained_parameters()
        for owner, names in enumerate(stage.optimizer.shards):
            for part in _buckets([parameters[name] for name in names]):
                flat = torch.cat([p.reshape(-1) for p in part])
                dist.broadcast(flat, ranks[owner], group=group)
                offset = 0
                for parameter in part:
                    size = parameter.numel()
                    parameter.copy_(flat[offset : offset + size].view_as(parameter))
                    offset += size

    def close(self) -> None:
        """Leave the groups."""
        self._travelling.clear()
        while self._groups:
            dist.destroy_process_group(self._groups.popitem()[1][1])


def _gradients(stage: TrainedStage) -> list[torch.Tensor]:
    found = []
    for name, parameter in stage.trained_parameters().items():
        gradient = stage.sums.of(parameter)
        assert gradient is not None, f"{stage.pipeline} stage {stage.pp_stage}: {name} got none"
        found.append(gradient)
    return found


def _buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one type, together at most `BUCKET_BYTES` (or alone, where larger)."""
    for _, same in itertools.groupby(tensors, key=lambda t: t.dtype):
        bucket: list[torch.Tensor] = []
        for tensor in same:
            if bucket and sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET_BYTES:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is not part of the group"
    return work
