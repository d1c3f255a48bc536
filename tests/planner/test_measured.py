"""Costs fitted from a step predict that step."""

import numpy as np
import pytest

from rlhfuse.config import (
    ActorConfig,
    Config,
    CriticConfig,
    DataConfig,
    RewardConfig,
    RolloutConfig,
)
from rlhfuse.cost import CostModel
from rlhfuse.placement import StagePlacement
from rlhfuse.planner.measured import (
    MeasuredStep,
    StepCosts,
    fit_step_costs,
    other_fusions,
    predict,
    predict_one,
    without_fusion,
)
from rlhfuse.planner.step import bubbles, drawn
from rlhfuse.planner.workload import Workload, workload_of
from rlhfuse.update_plan import StageCosts

CONFIG = Config(
    actor=ActorConfig(path="llama-7b", ppo_mini_batch_size=16, num_microbatches=2),
    critic=CriticConfig(path="llama-7b", ppo_mini_batch_size=16, num_microbatches=2),
    reward=RewardConfig(path="llama-7b"),
    rollout=RolloutConfig(response_length=128),
    data=DataConfig(train_batch_size=32, max_prompt_length=32),
)
LAYERS = ((0, 16), (16, 32))
PIPELINES = {"actor": StagePlacement((0, 1), LAYERS), "critic": StagePlacement((1, 0), LAYERS)}


def _stages(seed: int) -> StageCosts:
    forward = np.random.default_rng(seed).uniform(1e-4, 2e-4, 2)
    return StageCosts(
        tuple(forward.tolist()), tuple((2 * forward).tolist()), tuple(forward.tolist())
    )


TRUE = StepCosts(
    CostModel.default(), {"actor": _stages(1), "critic": _stages(2)}, 0.02, 0.01, 0.1, "given"
)


def _workload() -> Workload:
    return workload_of(CONFIG)


@pytest.mark.slow
def test_a_fused_step_is_shorter_and_adds_up() -> None:
    found = predict(CONFIG, _workload(), PIPELINES, TRUE)
    for seconds, timeline in (
        (found.serial, found.serial_timeline),
        (found.fused, found.fused_timeline),
    ):
        assert timeline.end_s == pytest.approx(seconds.step)
    assert found.fused.training < found.serial.training
    assert found.fused.step < found.serial.step
    assert sum(bubbles(found.fused_timeline).values()) < sum(
        bubbles(found.serial_timeline).values()
    )
    rows = drawn(found.fused_timeline, found.serial_timeline.end_s)
    assert len(rows) == 2
    assert all(any(letter in row for row in rows) for letter in "gsACw")


@pytest.mark.parametrize("serial", [False, True])
def test_costs_are_found_again_from_a_predicted_step(serial: bool) -> None:
    config = without_fusion(CONFIG) if serial else CONFIG
    workload = _workload()
    seconds, timeline = predict_one(config, workload, PIPELINES, TRUE, step=1)
    step = MeasuredStep(timeline, workload.tokens, seconds.training, seconds.other)
    wrong = StepCosts(
        TRUE.rollout,
        {role: StageCosts((1.0, 1.0), (1.0, 1.0), (0.5, 0.5)) for role in TRUE.stages},
        9.0,
        9.0,
        9.0,
        "wrong",
    )
    fitted = fit_step_costs(config, [step, step], wrong, "fitted")
    again, _ = predict_one(config, workload, PIPELINES, fitted, step=1)
    assert again.training == pytest.approx(seconds.training, rel=0.03)
    assert again.other == pytest.approx(seconds.other)


@pytest.mark.parametrize("serial", [False, True])
def test_the_other_way_to_run_a_step_is_foretold_from_its_timeline(serial: bool) -> None:
    off, workload = without_fusion(CONFIG), _workload()
    ran, other = (off, CONFIG) if serial else (CONFIG, off)
    seconds, timeline = predict_one(ran, workload, PIPELINES, TRUE, step=1)
    truth, _ = predict_one(other, workload, PIPELINES, TRUE, step=1)
    step = MeasuredStep(timeline, workload.tokens, seconds.training, seconds.other)
    wrong = StepCosts(TRUE.rollout, TRUE.stages, 9.0, 9.0, 9.0, "wrong")
    saved_s, simulated = other_fusions(other, workload, PIPELINES, ran, step, wrong, step=1)
    assert seconds.step - saved_s == pytest.approx(truth.step, rel=0.03)
    assert simulated == pytest.approx(1.0, rel=0.03)
