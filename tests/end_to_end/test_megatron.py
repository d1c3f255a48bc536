"""The launcher over Megatron models: fused equals serial, resumed equals uninterrupted."""

import hashlib
import shutil
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("megatron.core")

import rlhfuse.config as c
from rlhfuse.config import Config
from rlhfuse.launch import train_run
from rlhfuse.resolve import resolve
from rlhfuse.run_folder import RunFolder
from tests.end_to_end.tiny_run import make_assets, tiny_config

replace = msgspec.structs.replace


@pytest.mark.slow
def test_a_run_resumed_serially_ends_like_an_uninterrupted_fused_one(
    tmp_path: Path, ray_address: str
) -> None:
    """Two replicas of the actor with Megatron's distributed optimizer, the critic in two stages."""
    make_assets(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "runs", num_devices=2, ray_address=ray_address)
    whole = replace(
        config,
        actor=replace(config.actor, backend="megatron"),
        placement=replace(config.placement, actor_pp=1, critic_pp=2),
        trainer=replace(
            config.trainer, total_training_steps=2, save_freq=1, max_checkpoints=0, report=False
        ),
        fusion=c.FusionConfig(inter_stage="on", intra_stage="on"),
    )
    train_run(resolve(whole), resume=False)
    fused = _digests(whole, 2)
    shutil.rmtree(_checkpoint(whole, 2))
    (_checkpoint(whole, 1).parent / "latest_checkpointed_iteration.txt").write_text("1")
    shutil.rmtree(RunFolder(whole.trainer).restart, ignore_errors=True)
    serial = c.FusionConfig(inter_stage="off", intra_stage="off")
    train_run(resolve(replace(whole, fusion=serial)), resume=True)
    assert _digests(whole, 2) == fused


def _checkpoint(config: Config, step: int) -> Path:
    return RunFolder(config.trainer).checkpoints / f"global_step_{step}"


def _digests(config: Config, step: int) -> dict[str, str]:
    """Of both models' weights, as Hugging Face folders."""
    folder = _checkpoint(config, step)
    files = sorted(folder.rglob("*.safetensors"))
    assert {"actor", "critic"} <= {path.relative_to(folder).parts[0] for path in files}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
