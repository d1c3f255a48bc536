"""A whole run with Triton's kernels forced on, in its interpreter, is the plain run to rounding."""

import importlib.util
from pathlib import Path

import msgspec
import pytest

from rlhfuse.resolve import resolve
from rlhfuse.session import open_session
from rlhfuse.trainer import StepResult, Trainer
from tests.end_to_end.tiny_run import make_assets, ray_cluster, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _step(folder: Path, name: str, ray_address: str) -> StepResult:
    config = tiny_config(folder, folder / name, num_devices=1, ray_address=ray_address)
    small = msgspec.structs.replace(config.rollout, response_length=8)
    config = msgspec.structs.replace(config, rollout=small)
    with open_session(resolve(config), resume=False) as session:
        trainer = Trainer(session)
        trainer.sync_weights()
        return trainer.step()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_run_in_tritons_interpreter_equals_the_plain_one(
    tmp_path: Path, ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_assets(tmp_path)
    monkeypatch.delenv("RLHFUSE_KERNELS", raising=False)
    plain = _step(tmp_path, "plain", ray_address)
    monkeypatch.setenv("RLHFUSE_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with ray_cluster() as cluster:  # whose processes inherit the variables
        forced = _step(tmp_path, "forced", cluster.address)
    assert forced.tokens == plain.tokens
    assert forced.rewards == plain.rewards
    # Sums over all weights and tokens: what was computed differs by float32's rounding alone.
    names = [n for n in plain.metrics if n.startswith(("actor/", "critic/"))]
    assert {"actor/grad_norm", "critic/grad_norm", "actor/entropy", "actor/kl_loss"} & set(names)
    for name in names:
        assert forced.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4, abs=1e-6), name
    # Not one and the same computation.
    assert forced.weights != plain.weights
