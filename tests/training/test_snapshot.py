"""What is written aside is the moment of the snapshot, whatever training does meanwhile."""

import hashlib
import threading
import time
from pathlib import Path

import pytest

from rlhfuse.training.snapshot import AsideWriter, Snapshot
from tests.training.ranks import run_ranks
from tests.training.tiny_update import (
    KL_COEF,
    Models,
    cut,
    make_config,
    make_plans,
    make_problem,
    make_samples,
    make_trainer,
    save_models,
    serial_rounds,
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return save_models(tmp_path_factory.mktemp("models"))


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_copy_written_late_is_what_would_have_been_written_at_once(
    models: Models, tmp_path: Path
) -> None:
    config = make_config(models, split_weight=True)
    rounds = serial_rounds(make_problem(2, 2))

    def run(rank: int) -> None:
        trainer = make_trainer(config, rank, 2)
        for step in range(2):
            samples = make_samples(8, step)
            plans = make_plans(cut(samples, 2, 2), rounds)
            trainer.update(step, samples, plans, KL_COEF, [])
            if step == 0:
                copy = trainer.snapshot(("actor", "critic"), copy=True)
                trainer.snapshot(("actor", "critic")).write(tmp_path / "at_once")
        writer = AsideWriter()
        writer.start(copy, tmp_path / "late")
        trainer.snapshot(("actor", "critic")).write(tmp_path / "after")
        writer.wait()
        result = writer.take()
        assert result is not None
        assert result[0] == ""

    run_ranks(2, run)
    assert files(tmp_path / "late") == files(tmp_path / "at_once")
    assert files(tmp_path / "late") != files(tmp_path / "after")
    assert len(files(tmp_path / "late")) == 2 * 2 * 3 + 2  # stages, records, exports; numbers


def test_trouble_is_told_when_it_is_asked_for(tmp_path: Path) -> None:
    free = threading.Event()

    def part(folder: Path) -> None:
        free.wait(10)
        raise OSError(28, "No space left on device")

    writer = AsideWriter()
    assert writer.take() is None
    writer.start(Snapshot([part]), tmp_path)
    assert writer.busy
    assert writer.take() is None
    free.set()
    writer.wait()
    result = writer.take()
    assert result is not None
    assert "No space left on device" in result[0]
    assert not writer.busy
    start_s = time.monotonic()
    writer.wait()
    assert time.monotonic() - start_s < 1.0
