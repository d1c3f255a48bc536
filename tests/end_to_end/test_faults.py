"""What dies ends the run with one clear line, leaves nothing behind, and loses nothing."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import psutil
import pytest

from rlhfuse.config_file import dump
from rlhfuse.run_folder import RunFolder
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120.0


def _start(tmp_path: Path) -> tuple["subprocess.Popen[str]", RunFolder]:
    make_assets(tmp_path)
    config = tiny_config(tmp_path, tmp_path / "runs", num_devices=2)
    trainer = msgspec.structs.replace(
        config.trainer, total_training_steps=10_000, save_freq=1, val_before_train=False
    )
    config = msgspec.structs.replace(config, trainer=trainer)
    (tmp_path / "config.yaml").write_text(dump(config))
    run = subprocess.Popen(
        [sys.executable, "-m", "rlhfuse.cli.main", "train", str(tmp_path / "config.yaml")],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    return run, RunFolder(trainer)


def _wait_for_checkpoint(run: "subprocess.Popen[str]", folder: RunFolder) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while folder.latest() is None:
        assert run.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.2)


def _workers(folder: RunFolder) -> dict[str, psutil.Process]:
    pids = json.loads((folder.path / "workers.json").read_text())
    return {name: psutil.Process(pid) for name, pid in pids.items()}


def _all_gone(workers: dict[str, psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(list(workers.values()), timeout=30)
    return not alive


@pytest.mark.parametrize("victim", ["training-1", "rollout-0"])
def test_a_dead_worker_ends_the_run_with_its_name(tmp_path: Path, victim: str) -> None:
    run, folder = _start(tmp_path)
    _wait_for_checkpoint(run, folder)
    workers = _workers(folder)
    workers[victim].send_signal(signal.SIGKILL)
    _, told = run.communicate(timeout=DEADLINE_S)
    assert run.returncode == 1
    last = told.strip().splitlines()[-1]
    assert victim in last or "rank" in last
    assert "--resume" in last
    assert _all_gone(workers)
    assert folder.latest() is not None


def test_a_killed_driver_leaves_no_worker_behind(tmp_path: Path) -> None:
    run, folder = _start(tmp_path)
    _wait_for_checkpoint(run, folder)
    workers = _workers(folder)
    run.kill()
    run.communicate()
    assert _all_gone(workers)
    assert folder.latest() is not None
