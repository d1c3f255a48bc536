"""Plans: they add up, they say when fusion does not pay, and can be planned again."""

from pathlib import Path

import msgspec
import pytest

from rlhfuse.config import (
    ActorConfig,
    AlgorithmConfig,
    Config,
    CriticConfig,
    DataConfig,
    PlanConfig,
    RewardConfig,
    RewardFunctionConfig,
    RolloutConfig,
)
from rlhfuse.config_file import dump, from_tree, parse_yaml
from rlhfuse.planner.lengths_file import read_lengths
from rlhfuse.planner.plan import make_plan
from rlhfuse.planner.summary import Plan
from rlhfuse.timeline import Kind

PPO = Config(
    actor=ActorConfig(path="llama-7b", ppo_mini_batch_size=32),
    critic=CriticConfig(path="llama-7b", ppo_mini_batch_size=32),
    reward=RewardConfig(path="llama-7b"),
    rollout=RolloutConfig(response_length=512, old_log_probs="engine", score_token_budget=8192),
    data=DataConfig(train_batch_size=64, max_prompt_length=256),
    plan=PlanConfig(hardware="h100", num_nodes=4, response_median=100),
)
RULE = msgspec.structs.replace(
    PPO,
    actor=ActorConfig(path="llama-7b", ppo_mini_batch_size=64),
    algorithm=AlgorithmConfig(adv_estimator="grpo", use_kl_in_reward=False),
    reward=RewardConfig(function=RewardFunctionConfig(path="reward.py")),
    rollout=RolloutConfig(response_length=512, old_log_probs="engine", n=4),
)


@pytest.fixture(scope="module")
def ppo() -> Plan:
    return make_plan(PPO)


@pytest.mark.slow
def test_the_parts_add_up(ppo: Plan) -> None:
    summary = ppo.summary
    for which in ("serial", "fused"):
        parts = sum(getattr(pair, f"{which}_s") for pair in summary.stages.values())
        assert parts == pytest.approx(getattr(summary.step_s, which))
        # The timeline shows the same step (the cluster is small enough to be shown whole).
        assert getattr(ppo, which).end_s == pytest.approx(getattr(summary.step_s, which), rel=1e-6)
    assert summary.step_s.fused < summary.step_s.serial
    assert summary.worthwhile.intra_stage.worthwhile
    assert 0 < sum(summary.bubble.values()) < sum(summary.bubble_serial.values()) < 1
    memory = summary.memory_per_device
    assert summary.fits
    assert memory.total == pytest.approx(
        memory.weights + memory.optimizer + max(memory.activations, memory.kv)
    )
    assert len(summary.what_if) >= 5


@pytest.mark.slow
def test_planning_again_with_what_was_recommended_gives_the_same(ppo: Plan) -> None:
    tree = parse_yaml(dump(PPO), "it")
    assert isinstance(tree, dict)
    for key, value in ppo.summary.recommended.items():
        *sections, name = key.split(".")
        place = tree
        for section in sections:
            place = place[section]
        place[name] = value
    again = make_plan(from_tree(tree), compare=False).summary
    assert again.step_s.fused == pytest.approx(ppo.summary.step_s.fused, rel=0.02)


@pytest.mark.slow
def test_nothing_to_gain_is_said() -> None:
    """No critic, no reward model, no KL, two optimizer steps: nothing could overlap, and the plan
    says zero."""
    actor = msgspec.structs.replace(RULE.actor, ppo_mini_batch_size=32)
    summary = make_plan(msgspec.structs.replace(RULE, actor=actor), compare=False).summary
    assert summary.step_s.fused == pytest.approx(summary.step_s.serial)
    for worth in (summary.worthwhile.inter_stage, summary.worthwhile.intra_stage):
        assert not worth.worthwhile
        assert worth.saving_fraction == pytest.approx(0.0)
    assert "several optimizer steps" in summary.worthwhile.inter_stage.reason
    assert summary.recommended["fusion.inter_stage"] == "off"
    assert summary.recommended["fusion.intra_stage"] == "off"
    assert summary.recommended["fusion.early_training"] == "off"
    assert sum("does not pay" in text for text in summary.warnings) == 2


@pytest.mark.slow
def test_early_training_is_what_is_left_of_the_gain_without_a_critic() -> None:
    """One optimizer step: groups are trained behind the tail, but not the group of the longest
    response, nor faster than all devices could."""
    plan = make_plan(RULE, compare=False)
    summary, training = plan.summary, plan.summary.stages["training"]
    worth = summary.worthwhile.inter_stage
    assert worth.worthwhile
    assert "fusion.early_training" in worth.reason
    assert summary.recommended["fusion.early_training"] == "auto"
    saved = summary.step_s.serial - summary.step_s.fused
    assert worth.saving_fraction == pytest.approx(saved / summary.step_s.serial)
    assert 0 < saved < training.serial_s
    assert plan.fused.end_s == pytest.approx(summary.step_s.fused)
    tokens = sum(span.args["tokens"] for span in plan.fused.of_kinds((Kind.F,)).spans)  # type: ignore[misc]
    assert tokens >= 64 * 4 * 100  # every group is trained in the picture, too


@pytest.mark.slow
def test_without_a_tail_inference_cannot_hide() -> None:
    even = msgspec.structs.replace(PPO.plan, response_sigma=0.001)
    worth = make_plan(msgspec.structs.replace(PPO, plan=even), compare=False).summary.worthwhile
    assert not worth.inter_stage.worthwhile
    assert "tail" in worth.inter_stage.reason


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (PlanConfig(hardware="h100", num_nodes=1, devices_per_node=1), "plan.num_nodes"),
        (PlanConfig(num_nodes=1), "plan.hardware"),
    ],
)
def test_what_does_not_fit_is_an_error_with_a_way_out(changed: PlanConfig, told: str) -> None:
    big = msgspec.structs.replace(
        PPO, actor=ActorConfig(path="llama-65b", ppo_mini_batch_size=32), plan=changed
    )
    with pytest.raises(ValueError, match=told):
        make_plan(big)


def test_recorded_lengths_are_read(tmp_path: Path) -> None:
    written = {
        "a.jsonl": '{"response_length": 3}\n{"response_length": 40}\n',
        "b.csv": "id,response_length\nx,3\ny,40\n",
        "c.txt": "3\n40\n",
    }
    for name, text in written.items():
        (tmp_path / name).write_text(text)
        assert read_lengths(tmp_path / name) == [3, 40]
    (tmp_path / "d.txt").write_text("3\n-1\n")
    with pytest.raises(ValueError, match="line 2"):
        read_lengths(tmp_path / "d.txt")
