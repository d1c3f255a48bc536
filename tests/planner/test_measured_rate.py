"""Measured training costs replace the assumed part of the peak, and nothing else."""

from dataclasses import replace

import pytest

from rlhfuse.config import ActorConfig, Config, CriticConfig, DataConfig, PlanConfig
from rlhfuse.planner import costs
from rlhfuse.planner.costs import Parallel
from rlhfuse.planner.measured_rate import with_measured_training
from rlhfuse.planner.plan import cluster_of
from rlhfuse.planner.workload import workload_of
from rlhfuse.schedules.ir import Pipeline, Problem

CONFIG = Config(
    actor=ActorConfig(path="llama-7b", ppo_mini_batch_size=32),
    critic=CriticConfig(path="llama-7b", ppo_mini_batch_size=32),
    data=DataConfig(train_batch_size=64, max_prompt_length=256),
    plan=PlanConfig(hardware="h100", num_nodes=1, response_median=100),
)
WORKLOAD, CLUSTER = workload_of(CONFIG), cluster_of(CONFIG)


def _problem(train: float, name: str = "actor", stages: int = 4, scale: float = 1.0) -> Problem:
    """One pipeline as it would be measured on devices that reach `train` of their peak."""
    efficiency = replace(CLUSTER.device.efficiency, train=train, launch_s=0.0)
    cluster = replace(CLUSTER, device=replace(CLUSTER.device, efficiency=efficiency))
    times = costs.stage_times(
        WORKLOAD.models["actor"], "actor", cluster, Parallel(1, stages, 1),
        WORKLOAD.tokens_per_minibatch / 8, WORKLOAD.mean_total, recompute=False,
    )  # fmt: skip
    forward, backward = ([scale * t for t in part] for part in (times.forward, times.backward))
    pipe = Pipeline.make(name, range(stages), 8, forward, backward)
    return Problem(stages, (pipe,))


@pytest.mark.parametrize("train", [0.2, 0.35, 0.6])
@pytest.mark.parametrize("name", ["actor", "model"])
def test_the_rate_is_found_again(train: float, name: str) -> None:
    found = with_measured_training(CONFIG, WORKLOAD, CLUSTER, _problem(train, name))
    # Launches are counted in, so that a little less of the peak explains the same seconds.
    assert found.device.efficiency.train == pytest.approx(train, rel=0.08)
    assert "measured" in found.device.source
    rest = replace(found.device.efficiency, train=CLUSTER.device.efficiency.train)
    assert rest == CLUSTER.device.efficiency


def test_mistakes_are_named() -> None:
    two = Problem(4, tuple(replace(_problem(0.4).pipelines[0], name=n) for n in ("x", "y")))
    deep = Problem(64, (Pipeline.make("actor", range(64), 8, [0.1] * 64, [0.2] * 64),))
    for problem, message in (
        (_problem(0.4, scale=0.1), "of the peak of h100"),
        (two, "pipelines x, y are none of actor, critic"),
        (deep, "actor has 64 stages, actor.path llama-7b only 32 layers"),
    ):
        with pytest.raises(ValueError, match=message):
            with_measured_training(CONFIG, WORKLOAD, CLUSTER, problem)
