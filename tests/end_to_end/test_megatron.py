"""The launcher over Megatron models: fused equals serial, on the same workers."""

from pathlib import Path

import msgspec
import pytest

pytest.importorskip("megatron.core")

from rlhfuse.launch import verify_run
from tests.end_to_end.tiny_run import make_assets, tiny_config


@pytest.mark.slow
def test_fused_equals_serial_with_megatron_models(tmp_path: Path) -> None:
    """Two steps, a checkpoint loaded, and two more: samples, rewards and weights are the same."""
    make_assets(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "runs", num_devices=2)
    actor = msgspec.structs.replace(config.actor, backend="megatron")
    result = verify_run(msgspec.structs.replace(config, actor=actor), 2, tmp_path / "verify")
    assert result.first_difference is None
    assert result.equal
