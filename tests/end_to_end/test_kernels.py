"""A whole run with Triton's kernels forced on, in its interpreter, is the plain run to rounding."""

import importlib.util
from pathlib import Path

import msgspec
import pytest

from rlhfuse.config import Config
from rlhfuse.resolve import resolve
from rlhfuse.session import open_session
from rlhfuse.trainer import StepResult, Trainer
from tests.end_to_end.tiny_run import make_assets, ray_cluster, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def _step(config: Config) -> StepResult:
    with open_session(resolve(config), resume=False) as session:
        trainer = Trainer(session)
        trainer.sync_weights()
        return trainer.step()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_run_in_tritons_interpreter_equals_the_plain_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_assets(tmp_path)
    results = []
    for asked in ("auto", "triton"):
        monkeypatch.setenv("RLHFUSE_KERNELS", asked)
        monkeypatch.setenv("TRITON_INTERPRET", str(int(asked == "triton")))
        with ray_cluster() as cluster:  # whose processes inherit the variables
            runs = tmp_path / asked
            config = tiny_config(tmp_path, runs, num_devices=1, ray_address=cluster.address)
            small = msgspec.structs.replace(config.rollout, response_length=8)
            results.append(_step(msgspec.structs.replace(config, rollout=small)))
    plain, forced = results
    assert forced.tokens == plain.tokens
    assert forced.rewards == plain.rewards
    # Sums over all weights and tokens: what was computed differs by float32's rounding alone.
    names = [n for n in plain.metrics if n.startswith(("actor/", "critic/"))]
    assert {"actor/grad_norm", "critic/grad_norm", "actor/entropy", "actor/kl_loss"} & set(names)
    for name in names:
        assert forced.metrics[name] == pytest.approx(plain.metrics[name], rel=1e-4, abs=1e-6), name
    # Not one and the same computation.
    assert forced.weights != plain.weights
