"""PPO raises the reward: one short seed of a rule that a tiny random policy can learn."""

from pathlib import Path

import msgspec
import pytest

import rlhfuse.config as c
from rlhfuse.resolve import resolve
from rlhfuse.session import open_session
from rlhfuse.trainer import Trainer
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
replace = msgspec.structs.replace


def test_the_mean_reward_rises(tmp_path: Path, ray_address: str) -> None:
    make_assets(tmp_path)
    rule = tmp_path / "rule.py"
    # The share of words from the lower half of the vocabulary: about a half by chance.
    rule.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    words = solution_str.split()\n"
        "    return sum(int(w[1:]) < 22 for w in words if w[1:].isdigit()) / max(1, len(words))\n"
    )
    config = tiny_config(tmp_path, tmp_path / "runs", num_devices=2, ray_address=ray_address)
    config = replace(
        config,
        actor=replace(config.actor, optim=c.OptimConfig(lr=1e-2), ppo_epochs=2),
        critic=replace(config.critic, optim=c.OptimConfig(lr=1e-2), ppo_epochs=2),
        algorithm=replace(config.algorithm, kl_ctrl=c.KlControlConfig(kl_coef=0.0)),
        reward=c.RewardConfig(function=c.RewardFunctionConfig(path=str(rule))),
        rollout=replace(config.rollout, n=4),
        trainer=replace(config.trainer, total_training_steps=12),
    )
    with open_session(resolve(config), resume=False) as session:
        trainer = Trainer(session)
        trainer.sync_weights()
        scores = [trainer.step().metrics["critic/score/mean"] for _ in range(12)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.1, scores
