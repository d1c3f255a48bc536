"""What a run would do, before anything starts: arithmetic, placement, predicted step."""

import math

import msgspec
import numpy as np

from rlhfuse.config import Config
from rlhfuse.config_check import batch_arithmetic
from rlhfuse.placement import StagePlacement
from rlhfuse.resolve import Resolved
from rlhfuse.update_plan import TrainedSample, plan_update


class DryRun(msgspec.Struct, frozen=True):
    """`update_ratio`: predicted serial over fused time of one update, from relative stage costs."""

    total_steps: int
    num_prompts: int
    arithmetic: tuple[str, ...]
    pipelines: dict[str, StagePlacement]
    scored_roles: tuple[str, ...]
    update_ratio: float
    assumed: str

    def text(self) -> str:
        """For a terminal."""
        lines = ["Batch arithmetic", *(f"  {line}" for line in self.arithmetic), "Placement"]
        for role, pipeline in self.pipelines.items():
            stages = ", ".join(
                f"rank {rank}: layers {first}-{end - 1}"
                for rank, (first, end) in zip(pipeline.ranks, pipeline.layers, strict=True)
            )
            lines.append(f"  {role} pipeline: {stages}")
        lines.append(f"  scored on rollout workers: {', '.join(self.scored_roles) or 'nothing'}")
        lines.append("Predicted")
        lines.append(
            f"  one update: fused {self.update_ratio:.2f} times as fast as serial ({self.assumed})"
        )
        return "\n".join(lines)


def describe(run: Resolved) -> DryRun:
    """Plan the first step with assumed response lengths. Nothing is measured, nothing starts."""
    config = run.config
    plan = plan_update(
        config,
        _assumed_samples(config, run),
        run.pipelines,
        run.costs,
        roles=tuple(run.pipelines),
        fused=config.fusion.intra_stage != "off",
        step=1,
    )
    return DryRun(
        total_steps=run.total_steps,
        num_prompts=len(run.prompts),
        arithmetic=tuple(batch_arithmetic(config, len(run.prompts))),
        pipelines=run.pipelines,
        scored_roles=config.scored_roles,
        update_ratio=plan.serial_s / plan.predicted_s,
        assumed="response lengths assumed lognormal, stage costs from the models' shapes",
    )


def _assumed_samples(config: Config, run: Resolved) -> list[TrainedSample]:
    """A batch with lengths of a usual, long-tailed shape: median a sixth of the limit."""
    count = config.data.train_batch_size * config.rollout.n
    limit = config.rollout.response_length
    median = max(1.0, limit / 6)
    quantiles = (np.arange(count) + 0.5) / count
    # The normal quantile function by the logistic approximation: a shape, not a statistic.
    normal = np.log(quantiles / (1 - quantiles)) / (math.pi / math.sqrt(3))
    lengths = np.minimum(limit, np.maximum(1, median * np.exp(0.8 * normal))).astype(int)
    prompts = [len(prompt.tokens) for prompt in run.prompts[:count]]
    return [
        TrainedSample(i, i // config.rollout.n, int(length) + prompts[i % len(prompts)])
        for i, length in enumerate(lengths)
    ]
