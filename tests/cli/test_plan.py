"""``rlhfuse plan`` keeps its contract: one JSON object, exit codes, a page."""

from pathlib import Path

import msgspec
import pytest

from rlhfuse.cli.common import MISTAKE, OK, run_command
from rlhfuse.cli.plan import plan

CONFIG = """
actor: {path: llama-7b, ppo_mini_batch_size: 16}
critic: {path: llama-7b, ppo_mini_batch_size: 16}
reward: {path: llama-7b}
rollout: {response_length: 256, old_log_probs: engine}
data: {train_batch_size: 32, max_prompt_length: 128}
plan: {hardware: h100, num_nodes: 2}
"""
KEYS = {"step_s", "stages", "bubble", "memory_per_device", "fits", "recommended", "worthwhile",
        "warnings"}  # fmt: skip


def _config(tmp_path: Path, text: str = CONFIG) -> str:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    return str(path)


@pytest.mark.slow
def test_one_json_object_and_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, trace = tmp_path / "plan.html", tmp_path / "trace.json"
    args = [_config(tmp_path), "--json", "--no-what-if", "--html", str(page),
            "--perfetto", str(trace)]  # fmt: skip
    assert run_command(plan, args) == OK
    summary = msgspec.json.decode(capsys.readouterr().out)
    assert set(summary) >= KEYS
    assert set(summary["stages"]) == {"generation", "inference", "training", "other"}
    assert summary["num_devices"] == 16
    text = page.read_text()
    assert "predicted, not measured" in text
    assert "data:" not in text.split("<body")[0].split("<style")[0]
    assert trace.stat().st_size > 1000


@pytest.mark.slow
def test_the_text_says_that_it_is_a_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = [_config(tmp_path), "--nodes", "1", "--hardware", "a100", "--no-what-if"]
    assert run_command(plan, args) == OK
    told = capsys.readouterr().out
    assert "Predicted, not measured: 8 x a100" in told
    assert "recommended" in told


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--hardware", "h1000"], "plan.hardware"),
        (["actor.path=nowhere"], "nowhere"),
        (["plan.hardwear=h100"], "plan.hardware"),
        (["plan.lengths_file=missing.txt"], "missing.txt"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, args: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(plan, [_config(tmp_path), *args]) == MISTAKE
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
