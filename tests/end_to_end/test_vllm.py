"""A whole run on two vLLM instances: serial, or fused and with deaths in every stage, the tokens,
rewards and weights are the same, bit for bit."""

import dataclasses
import re
import signal
from pathlib import Path

import msgspec
import pytest

import rlhfuse.config as c
from rlhfuse import messages as m
from rlhfuse.config import Config
from rlhfuse.engines.vllm_setup import installed_version
from rlhfuse.resolve import resolve
from rlhfuse.rollout import loop, stage
from rlhfuse.rollout.policy import Migration, Policy
from rlhfuse.rollout.stage import rollout_policy
from rlhfuse.session import open_session
from rlhfuse.trainer import Fusions, StepResult, Trainer
from tests.end_to_end.sabotage import Fault, sabotage, start_over
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(installed_version() is None, reason="vLLM is not installed"),
]
replace = msgspec.structs.replace
SCORE = """
import os, signal
def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    armed = os.path.join(os.path.dirname(__file__), "armed")
    if os.path.exists(armed):
        os.remove(armed)
        os.kill(os.getpid(), signal.SIGKILL)
    return float(len(solution_str.split()) % 7)
"""
FAULTS = [
    Fault(1, m.Export, "rollout"),  # migration: the source
    Fault(2, m.PullWeights, "rollout", delay_s=0.002),  # of step 1, by the one that is left
    Fault(2, m.Export, "rollout", victim="other"),  # migration: the destination
    Fault(2, m.Score, "rollout", delay_s=0.01),
    # One dies in generation, before samples move; the other is given what it had, and hangs.
    Fault(3, m.Generate, "rollout-1", delay_s=0.04),
    Fault(3, m.Generate, "rollout-0", signal.SIGCONT),  # harmless: the first of its commands
    Fault(3, m.Generate, "rollout-0", signal.SIGSTOP, delay_s=0.02),
    Fault(3, m.Train, "training-1", delay_s=0.01),
]


def _config(folder: Path, ray_address: str) -> Config:
    make_assets(folder, hidden=128)  # heads of 32, the least that vLLM has on a CPU
    (folder / "rule.py").write_text(SCORE)
    config = tiny_config(folder, folder, num_devices=2, ray_address=ray_address)
    return replace(
        config,
        reward=c.RewardConfig(function=c.RewardFunctionConfig(path=str(folder / "rule.py"))),
        # Long enough to be hit in the middle; instances give back their memory between.
        rollout=replace(config.rollout, engine="vllm", sleep="on", response_length=96),
        trainer=replace(
            config.trainer,
            total_training_steps=3,
            val_before_train=False,
            report=False,
            restart_freq=1,
            wait_timeout_s=400.0,  # two imports of vLLM
            heartbeat_timeout_s=5.0,
        ),
    )


def _forced(config: Config, sampling: m.Sampling, *, overlap: bool) -> Policy:
    """Whether a move pays is the cost model's to say; here one is to happen in every step."""
    policy = rollout_policy(config, sampling, overlap=overlap)
    if not overlap:
        return policy
    return dataclasses.replace(policy, migration=Migration.FORCED, forced=((12, 1),))


def _bits(history: list[StepResult]) -> list[tuple[int, str, str, str]]:
    return [(h.step, h.tokens, h.rewards, h.weights) for h in history]


def test_fused_steps_with_deaths_in_every_stage_are_the_serial_ones_on_vllm(
    tmp_path: Path,
    ray_address: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(stage, "rollout_policy", _forced)
    monkeypatch.setattr(loop, "_QUIET_S", 1.0)
    with open_session(resolve(_config(tmp_path, ray_address)), resume=False) as session:
        start = Trainer(session).save()
        serial = Trainer(session, Fusions(inter_stage=False, intra_stage=False))
        serial.fit()
        start_over(session, start)
        fused = Trainer(session)
        fused.sync_weights()
        assert _bits([fused.step()]) == _bits(serial.history[:1])
        assert fused.history[0].metrics["fusion/moved_samples"] > 0
        start_over(session, start)
        (tmp_path / "armed").touch()  # the reward process dies, too
        disturbed = Trainer(session)
        with sabotage(session, list(FAULTS), together={2, 3}) as saboteur:
            disturbed.fit()
        assert not saboteur.left, f"never came to pass: {saboteur.left}"
    assert _bits(disturbed.history) == _bits(serial.history)
    assert not (tmp_path / "armed").exists()
    assert disturbed.history[-1].metrics["fault/rollout_workers_lost"] == 6
    told = capfd.readouterr().err
    # Of a rank that is killed its peer may tell first.
    assert re.search(
        r"training-\d( is lost)?: (?s:.*); the training workers are started again \(1 of 3\)", told
    )
    assert "generating (samples " in told, "what is waited for while an instance hangs"
