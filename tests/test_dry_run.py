"""The dry run predicts the step: from data alone, or from what an earlier run measured."""

import dataclasses
import json
import re
from pathlib import Path

import msgspec
import pytest

from rlhfuse.config_file import dump
from rlhfuse.dry_run import describe
from rlhfuse.planner.measured import predict_one
from rlhfuse.planner.workload import workload_of
from rlhfuse.resolve import Resolved, resolve
from rlhfuse.run_costs import described
from rlhfuse.run_folder import RunFolder
from rlhfuse.timeline import save_chrome
from tests.end_to_end.tiny_run import make_assets, tiny_config


@pytest.fixture
def run(tmp_path: Path) -> Resolved:
    make_assets(tmp_path / "assets")
    return resolve(tiny_config(tmp_path / "assets", tmp_path / "runs", num_devices=2))


def test_a_prediction_without_any_measurement(run: Resolved) -> None:
    plan = describe(run)
    for which in ("serial", "fused"):
        parts = sum(getattr(pair, f"{which}_s") for pair in plan.stages.values())
        assert parts == pytest.approx(getattr(plan.step_s, which))
    assert "nothing was measured" in plan.costs_from
    text = plan.text()
    assert "a prediction, nothing ran" in text
    assert "rank0 g" in text
    assert msgspec.json.decode(msgspec.json.encode(plan))["step_s"]["serial"] > 0
    assert "refused" not in text


def test_a_machine_that_is_too_small_is_named(run: Resolved) -> None:
    replace = msgspec.structs.replace
    rollout = replace(run.config.rollout, cache_tokens=10**12)
    huge = dataclasses.replace(run, config=replace(run.config, rollout=rollout))
    told = describe(huge).text()
    assert re.search(r"refused here: node .* has [\d.]+ GiB .* needs \d+.*cache_tokens", told)
    elsewhere = replace(huge.config, placement=replace(run.config.placement, ray_address="h:1"))
    assert not describe(dataclasses.replace(huge, config=elsewhere)).refused


def _pretend(run: Resolved, seconds_factor: float) -> None:
    """A run folder with three steps that took `seconds_factor` times what the data say."""
    workload = workload_of(run.config)
    costs = described(run, workload)
    seconds, timeline = predict_one(run.config, workload, run.pipelines, costs, step=1)
    slower = [
        msgspec.structs.replace(
            span, start_s=seconds_factor * span.start_s, end_s=seconds_factor * span.end_s
        )
        for span in timeline.spans
    ]
    folder = RunFolder(run.config.trainer)
    folder.create(dump(run.config))
    rows = []
    for step in (1, 2, 3):
        save_chrome(msgspec.structs.replace(timeline, spans=tuple(slower)), folder.timeline(step))
        rows.append(
            {
                "step": step,
                "perf/total_num_tokens": workload.tokens,
                "timing_s/update": seconds_factor * seconds.training,
                "timing_s/update_weights": seconds_factor * seconds.other,
                "response_length/median": 9.0,
                "response_length/p99": 40.0,
            }
        )
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder.path / "metrics.jsonl").write_text(lines + '{"step": 4, "cut')


def test_an_earlier_run_says_more_than_data(run: Resolved) -> None:
    before = describe(run)
    _pretend(run, 10.0)
    after = describe(run)
    assert "measured: the last 3 steps" in after.costs_from
    assert "median 9" in after.assumed
    ratio = after.stages["training"].serial_s / before.stages["training"].serial_s
    assert 7 < ratio < 14  # other lengths, ten times the costs


def test_an_earlier_run_of_another_model_is_not_used(
    run: Resolved, caplog: pytest.LogCaptureFixture
) -> None:
    _pretend(run, 10.0)
    folder = RunFolder(run.config.trainer).path
    other = msgspec.structs.replace(run.config.actor, path="another")
    (folder / "config.yaml").write_text(dump(msgspec.structs.replace(run.config, actor=other)))
    assert "nothing was measured" in describe(run).costs_from
    assert "actor.path" in caplog.text


def test_early_training_is_told_with_its_gain_or_a_reason(tmp_path: Path) -> None:
    make_assets(tmp_path / "assets", hidden=256)
    replace = msgspec.structs.replace
    ppo = tiny_config(tmp_path / "assets", tmp_path / "runs", num_devices=2)
    config = replace(
        ppo,
        algorithm=replace(ppo.algorithm, adv_estimator="grpo"),
        actor=replace(ppo.actor, num_microbatches=0),
        rollout=replace(ppo.rollout, n=8, old_log_probs="engine", response_length=384),
        data=replace(ppo.data, train_batch_size=8),
        placement=replace(ppo.placement, actor_pp=1),
    )

    def told(sigma: float, early: str, mini_batch: int = 8) -> str:
        changed = replace(
            config,
            actor=replace(config.actor, ppo_mini_batch_size=mini_batch),
            plan=replace(config.plan, response_sigma=sigma),
            fusion=msgspec.convert({"early_training": early}, type(config.fusion)),
        )
        return describe(resolve(changed)).early_training

    (saved,) = re.findall(r"saves (.*)% of the step", told(0.8, "auto"))
    assert float(saved) > 5.0
    assert "possible here, and would save 0.0% of the step" in told(0.01, "off")
    assert "several optimizer steps" in told(0.8, "auto", mini_batch=4)
    assert describe(resolve(ppo)).early_training == ""
