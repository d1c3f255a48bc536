"""Same samples, same update: whole runs, compared bit for bit (CPU, float32)."""

import hashlib
import json
from pathlib import Path

import msgspec
import pytest

from rlhfuse.config import Config
from rlhfuse.launch import train_run, verify_run
from rlhfuse.resolve import resolve
from rlhfuse.run_folder import RunFolder
from rlhfuse.run_what_if import SERIAL, simulated_what_if
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
replace = msgspec.structs.replace


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("assets")
    make_assets(folder)
    return folder


def test_fused_equals_serial(assets: Path, tmp_path: Path, ray_address: str) -> None:
    """On four devices; on two, and two nodes: `test_two_nodes`."""
    config = tiny_config(assets, tmp_path, num_devices=4, ray_address=ray_address)
    result = verify_run(config, 2, tmp_path)
    assert result.first_difference is None
    assert result.equal


def test_fused_equals_serial_with_split_weights_epochs_and_groups(
    assets: Path, tmp_path: Path, ray_address: str
) -> None:
    config = tiny_config(assets, tmp_path, num_devices=2, ray_address=ray_address)
    config = replace(
        config,
        actor=replace(config.actor, ppo_epochs=2, entropy_coeff=0.01, num_microbatches=3),
        critic=replace(config.critic, ppo_epochs=2),
        rollout=replace(config.rollout, n=2, top_p=0.9, temperature=0.7),
        fusion=replace(config.fusion, split_weight=True),
    )
    result = verify_run(config, 2, tmp_path)
    assert result.first_difference is None
    assert result.equal


def test_critic_free_fused_equals_serial(assets: Path, tmp_path: Path, ray_address: str) -> None:
    config = tiny_config(assets, tmp_path, num_devices=2, ray_address=ray_address)
    config = replace(
        config,
        algorithm=replace(config.algorithm, adv_estimator="grpo"),
        actor=replace(config.actor, use_kl_loss=True, ppo_mini_batch_size=4),
        rollout=replace(config.rollout, n=4),
        data=replace(config.data, train_batch_size=8),
    )
    # Serially scorers compute all reference log-probabilities, fused the update does the later.
    assert resolve(config).reference
    result = verify_run(config, 2, tmp_path)
    assert result.first_difference is None
    assert result.equal


def test_a_resumed_run_ends_like_an_uninterrupted_one(
    assets: Path, tmp_path: Path, ray_address: str
) -> None:
    def tiny(name: str) -> Config:
        runs = tmp_path / name
        return _truncated(tiny_config(assets, runs, num_devices=2, ray_address=ray_address))

    # 40 prompts in batches of 16: the third step crosses the end of an epoch.
    whole = _with_steps(tiny("whole"), 4)
    train_run(resolve(whole), resume=False)
    stopped = tiny("stopped")
    for steps in (1, 3, 4):
        # The learning rate follows the whole run: only the stop comes earlier.
        train_run(resolve(_with_steps(stopped, steps)), resume=steps > 1)
    for step in range(1, 5):
        assert _digests(stopped, step) == _digests(whole, step)
    _check_replay(RunFolder(whole.trainer).path)
    _check_what_if(RunFolder(whole.trainer).path)
    _check_memory(RunFolder(whole.trainer).path)


def _truncated(config: Config) -> Config:
    return replace(config, rollout=replace(config.rollout, top_p=0.9, top_k=30))


def _check_memory(folder: Path) -> None:
    """What each training rank took stands beside its plan."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in lines if "timing_s/update" in metrics]
    assert len(steps) == 4
    for metrics in steps:
        both = [
            [metrics[f"memory/rank{rank}/{what}_gb"] for rank in range(2)]
            for what in ("peak", "planned")
        ]
        ratios = [peak / planned for peak, planned in zip(*both, strict=True)]
        assert metrics["perf/max_memory_over_plan"] == pytest.approx(max(ratios))
        # A tiny model: mostly what the processes themselves take, by the machine's libraries.
        assert 0.1 < min(ratios) <= max(ratios) < 10


def _check_replay(folder: Path) -> None:
    """The trainer's log-probabilities are those that the sampler drew with, to rounding."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [metrics for metrics in lines if "training/rollout_logprobs_diff_mean" in metrics]
    assert len(steps) == 4  # another line is validation alone
    for metrics in steps:
        # Without replay a tenth of a nat. A token at an edge that rounding decides may differ.
        assert metrics["training/rollout_logprobs_diff_mean"] < 1e-4
        assert 1.0 < metrics["rollout/kept_tokens_mean"] < metrics["rollout/kept_tokens_max"] <= 30


def _check_what_if(folder: Path) -> None:
    """The profiler simulates a recorded step without its fusions, validated or not."""
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "val-core/test/reward/mean@1": 0.5}\n')
    for step in (3, 4):
        what, told = simulated_what_if(folder, step)
        assert what.name == SERIAL
        assert what.makespan_s > 0
        assert "the step as it ran takes" in told


def _with_steps(config: Config, steps: int) -> Config:
    """With a checkpoint of every step, all but the last written while training goes on."""
    trainer = replace(
        config.trainer, total_training_steps=steps, report=False, save_freq=1, max_checkpoints=0
    )
    return replace(config, trainer=trainer)


def _digests(config: Config, step: int) -> dict[str, str]:
    folder = RunFolder(config.trainer).checkpoints / f"global_step_{step}"
    files = sorted(folder.rglob("*.safetensors"))
    assert files
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
