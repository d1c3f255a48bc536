"""A whole run on two vLLM instances: fused equals serial, tokens and weights, bit for bit."""

from pathlib import Path

import msgspec
import pytest

from rlhfuse.engines.vllm_setup import installed_version
from rlhfuse.launch import verify_run
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.skipif(installed_version() is None, reason="vLLM is not installed"),
]


def test_fused_equals_serial_on_vllm(tmp_path: Path) -> None:
    make_assets(tmp_path, hidden=128)  # heads of 32, the least that vLLM has on a CPU
    config = tiny_config(tmp_path, tmp_path, num_devices=2)
    replace = msgspec.structs.replace
    config = replace(
        config,
        rollout=replace(config.rollout, engine="vllm", sleep="on"),
        trainer=replace(config.trainer, wait_timeout_s=400.0),  # two imports of vLLM
    )
    result = verify_run(config, 1, tmp_path)
    assert result.first_difference is None
    assert result.equal
