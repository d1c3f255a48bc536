"""The frozen reference in an update: log-probabilities of later mini-batches, forward only.

Its pipelines run in the actor's bubbles. What they compute is what a rollout worker's scorer would
have: the same layers on the same rows, whatever the stages and the company (CPU, float32).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from rlhfuse.config import Config
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.models.loading import load_stage
from rlhfuse.models.stage import Head
from rlhfuse.placement import StagePlacement
from rlhfuse.training.batch import MicroBatch, make_microbatch
from rlhfuse.training.control import Control
from rlhfuse.training.executor import StageRunner
from rlhfuse.training.records import Floats, MiniBatchPlan, SampleData
from rlhfuse.training.stage_runner import ForwardRunner


class ReferenceStage:
    """One stage of the reference, which is never trained."""

    def __init__(
        self,
        config: Config,
        pipeline: str,
        pp_stage: int,
        placement: StagePlacement,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raises ValueError where the model folder does not fit (see `load_stage`)."""
        self.pipeline = pipeline
        self.pp_stage = pp_stage
        self._temperature = config.rollout.temperature
        self._stage = load_stage(
            reference_path(config),
            head=Head.LM,
            layers=range(*placement.layers[pp_stage]),
            first=pp_stage == 0,
            last=pp_stage == len(placement.ranks) - 1,
            device=device,
            dtype=dtype,
        )
        self._stage.requires_grad_(False).eval()
        self.runner = ForwardRunner(self._compute, last=self._stage.last)
        self._batches: Sequence[MicroBatch] = ()
        self._found: dict[int, torch.Tensor] = {}

    def begin(self, batches: Sequence[MicroBatch]) -> None:
        """Get ready for these micro-batches."""
        self._batches = batches
        self._found = {}

    def take(self) -> torch.Tensor:
        """Log-probabilities of all response tokens, micro-batch after micro-batch: float32 [T] on
        the CPU. Of the last stage alone."""
        return torch.cat([self._found[mb].float().cpu() for mb in sorted(self._found)])

    def _compute(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor:
        batch = self._batches[microbatch]
        inputs = batch.packed.token_ids if received is None else received
        hidden: torch.Tensor = self._stage(inputs, batch.packed)
        if not self._stage.last:
            return hidden
        found = linear_logprob(
            hidden[batch.rows],
            self._stage.lm_head_weight(),
            batch.labels,
            temperature=self._temperature,
        ).logprob
        self._found[microbatch] = found
        return found


class References:
    """The reference's stages of one rank, and what all ranks have learned from all of them."""

    def __init__(
        self,
        config: Config,
        pipelines: Mapping[str, StagePlacement],
        rank: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raises ValueError where the model folder does not fit."""
        self._pipelines = dict(sorted(pipelines.items()))
        self._rank = rank
        self._device = device
        self.stages = [
            ReferenceStage(config, name, s, place, device=device, dtype=dtype)
            for name, place in self._pipelines.items()
            for s, home in enumerate(place.ranks)
            if home == rank
        ]

    @property
    def runners(self) -> dict[tuple[str, int], StageRunner]:
        """By pipeline and pp_stage, for the executor."""
        return {(stage.pipeline, stage.pp_stage): stage.runner for stage in self.stages}

    def begin(self, plan: MiniBatchPlan, by_id: Mapping[int, SampleData]) -> None:
        """Get ready for the forward passes of one mini-batch's schedule."""
        for stage in self.stages:
            stage.begin(
                [
                    make_microbatch([by_id[i] for i in ids], None, self._device)
                    for ids in plan.forward.get(stage.pipeline, ())
                ]
            )

    def gather(
        self, plan: MiniBatchPlan, by_id: Mapping[int, SampleData], control: Control
    ) -> dict[int, Floats]:
        """After that schedule: every rank learns what the last stages found, by sample.
        Collective."""
        found: dict[int, Floats] = {}
        for name in sorted(plan.forward):
            ids = [i for microbatch in plan.forward[name] for i in microbatch]
            lengths = [len(by_id[i].response) for i in ids]
            home = self._pipelines[name].ranks[-1]
            flat = torch.empty(sum(lengths))
            if home == self._rank:
                flat = self._last(name).take()
            control.broadcast(flat, home)
            parts = np.split(flat.numpy(), np.cumsum(lengths)[:-1])
            found.update(zip(ids, parts, strict=True))
        return found

    def _last(self, name: str) -> ReferenceStage:
        number = len(self._pipelines[name].ranks) - 1
        (stage,) = (s for s in self.stages if (s.pipeline, s.pp_stage) == (name, number))
        return stage


def reference_path(config: Config) -> str:
    """The reference's folder: the actor's starting weights where none is named."""
    return config.reference.path or config.actor.path
