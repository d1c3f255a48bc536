"""A whole run on two vLLM instances: fused, serial or disturbed, the tokens, rewards and weights
are the same, bit for bit."""

import signal
from pathlib import Path

import msgspec
import pytest

from rlhfuse import messages as m
from rlhfuse.config import Config
from rlhfuse.engines.vllm_setup import installed_version
from rlhfuse.resolve import resolve
from rlhfuse.session import Session, open_session
from rlhfuse.trainer import Fusions, StepResult, Trainer
from tests.end_to_end.sabotage import Fault, sabotage, start_over
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(installed_version() is None, reason="vLLM is not installed"),
]
replace = msgspec.structs.replace


def _config(folder: Path) -> Config:
    make_assets(folder, hidden=128)  # heads of 32, the least that vLLM has on a CPU
    config = tiny_config(folder, folder, num_devices=2)
    return replace(
        config,
        # Long enough to be hit in the middle; instances give back their memory between.
        rollout=replace(config.rollout, engine="vllm", sleep="on", response_length=96),
        trainer=replace(
            config.trainer,
            wait_timeout_s=400.0,  # two imports of vLLM
            heartbeat_timeout_s=5.0,
        ),
    )


def _step(
    session: Session, start: Path, *faults: Fault, fused: bool = True, together: bool = False
) -> StepResult:
    """The first step, from the same start."""
    start_over(session, start)
    trainer = Trainer(session, Fusions(inter_stage=fused, intra_stage=fused))
    trainer.sync_weights()
    with sabotage(session, list(faults), together={1} if together else set()) as saboteur:
        result = trainer.step()
    assert not saboteur.left
    return result


def _bits(result: StepResult) -> tuple[str, str, str]:
    return result.tokens, result.rewards, result.weights


def test_fused_serial_and_disturbed_steps_are_the_same_on_vllm(tmp_path: Path) -> None:
    with open_session(resolve(_config(tmp_path)), resume=False) as session:
        start = Trainer(session).save()
        serial = _step(session, start, fused=False)
        assert _bits(_step(session, start)) == _bits(serial)
        # One instance dies in generation, the other takes over and dies fetching the new weights.
        dies = Fault(1, m.Generate, "rollout-1", delay_s=0.15)
        fetches = Fault(2, m.PullWeights, "rollout-0", delay_s=0.002)
        killed = _step(session, start, dies, fetches)
        assert killed.metrics["fault/samples_rescued"] > 0
        assert _bits(killed) == _bits(serial)
        # A hung engine, once the instances that died are back; then one that dies scoring.
        hangs = Fault(1, m.Generate, "rollout-0", signal.SIGSTOP, delay_s=0.15)
        scores = Fault(1, m.Score, "rollout-1", delay_s=0.01)
        stopped = _step(session, start, hangs, scores, together=True)
        assert stopped.metrics["fault/samples_rescued"] > 0
        assert _bits(stopped) == _bits(serial)
