"""Loggers: what goes in can be read back, also after a crash and a resume."""

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from rlhfuse.metrics import JsonlLogger, cut_jsonl, open_loggers
from rlhfuse.progress import Progress


def _quiet() -> Progress:
    return Progress(10, console=Console(file=io.StringIO()))


def _rows(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_jsonl_gives_back_every_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "metrics.jsonl"
    logger = JsonlLogger(path)
    for step in range(1, 4):
        logger.log(step, {"critic/rewards/mean": step / 8, "bubble/long_tail": 0.1 * step})
    # Flushed at once: a reader sees the steps of a run that still works.
    assert [row["step"] for row in _rows(path)] == [1, 2, 3]
    logger.close()
    assert _rows(path)[2] == {
        "step": 3,
        "critic/rewards/mean": 0.375,
        "bubble/long_tail": 0.1 * 3,
    }


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "m.jsonl")
    logger.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})
    logger.close()
    assert _rows(tmp_path / "m.jsonl") == [{"step": 1, "a": None, "b": None, "c": 1.0}]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "x', '{"step": 6, "x": 1}', "\x00\x00", "[]\n"])
def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path: Path, torn: str) -> None:
    """Interrupted or not, the file ends up as the uninterrupted run writes it."""
    straight, resumed = tmp_path / "straight.jsonl", tmp_path / "resumed.jsonl"
    logger = JsonlLogger(straight)
    for step in range(1, 7):
        logger.log(step, {"x": float(step)})
    logger.close()
    first = JsonlLogger(resumed)
    for step in range(1, 6):
        first.log(step, {"x": float(step)})
    first.close()
    with resumed.open("a") as file:
        file.write(torn)
    second = JsonlLogger(resumed, keep_steps=3)
    for step in range(4, 7):
        second.log(step, {"x": float(step)})
    second.close()
    assert resumed.read_bytes() == straight.read_bytes()
    assert not list(tmp_path.glob("*.part"))


def test_cutting_nothing_leaves_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    cut_jsonl(path, 3)
    assert not path.exists()
    path.write_text('{"step": 1}\n')
    before = path.stat().st_ino
    cut_jsonl(path, 3)
    assert path.stat().st_ino == before


def test_a_fresh_run_does_not_continue_an_old_file(tmp_path: Path) -> None:
    for _ in range(2):
        with open_loggers(
            ["jsonl"], tmp_path, progress=_quiet(), project="p", experiment="e"
        ) as loggers:
            loggers.log(1, {"x": 1.0})
    assert len(_rows(tmp_path / "metrics.jsonl")) == 1


def test_tensorboard_can_be_read_back(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        with open_loggers(
            ["tensorboard"],
            tmp_path,
            progress=_quiet(),
            project="p",
            experiment="e",
            resume_step=resume,
        ) as loggers:
            for step in steps:
                loggers.log(step, {"actor/pg_loss": step / 2})
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    read = [(event.step, event.value) for event in events.Scalars("actor/pg_loss")]
    assert read == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]


def test_an_unknown_logger_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trainer\.logger: unknown logger 'mlflow'"):
        open_loggers(["mlflow"], tmp_path, progress=_quiet(), project="p", experiment="e")


def test_a_missing_wandb_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)  # import raises ImportError
    with pytest.raises(ValueError, match="wandb is not installed"):
        open_loggers(["wandb"], tmp_path, progress=_quiet(), project="p", experiment="e")
