"""``rlhfuse schedule`` keeps its contract: one JSON object, exit codes, files."""

from pathlib import Path

import msgspec
import pytest

from rlhfuse.cli.common import MISTAKE, OK, run_command
from rlhfuse.cli.schedule import schedule
from rlhfuse.schedules.formats import schedule_from_json
from rlhfuse.schedules.timing import check_channels, makespan

PROBLEM = """
ranks: 2
pipelines:
  - {name: actor, stages: [0, 1], microbatches: 4, forward: 1, backward: 2, weight: 1}
  - {name: critic, stages: [1, 0], microbatches: 4, forward: 1, backward: 2, weight: 1}
"""


def _problem(tmp_path: Path) -> str:
    path = tmp_path / "problem.yaml"
    path.write_text(PROBLEM)
    return str(path)


def test_one_json_object_and_a_schedule_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    args = [_problem(tmp_path), "--json", "--iterations", "20", "-o", str(out)]
    assert run_command(schedule, args) == OK
    summary = msgspec.json.decode(capsys.readouterr().out)
    found = schedule_from_json(out.read_bytes())
    check_channels(found)
    assert makespan(found) == summary["makespan"]
    assert summary["serial_makespan"] == 30
    # Two equal models on two ranks leave no bubble with four micro-batches each.
    assert summary["makespan"] == summary["lower_bound"] == 24
    assert summary["proven_optimal"] is True
    assert summary["bubble_fraction"] == pytest.approx(0.0)


def test_an_infeasible_cap_exits_2_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    args = [_problem(tmp_path), "--memory-cap", "0.5", "-o", str(out)]
    assert run_command(schedule, args) == MISTAKE
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert "least cap that does is 1" in told.err
    assert told.out == ""
    assert not out.exists()


@pytest.mark.parametrize("policy", ["serial", "1f1b", "gpipe", "zb-h1"])
def test_policies_and_a_plot(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.svg"
    args = [_problem(tmp_path), "--policy", policy, "--plot", str(plot), "--json"]
    assert run_command(schedule, args) == OK
    summary = msgspec.json.decode(capsys.readouterr().out)
    assert summary["makespan"] >= summary["lower_bound"] - 1e-9
    assert "rank 1" in plot.read_text() or plot.stat().st_size > 5000
