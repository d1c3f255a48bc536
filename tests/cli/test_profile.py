"""``rlhfuse profile``: the contract of its output and of its exit codes."""

import json
from pathlib import Path

import pytest

from rlhfuse.cli.common import run_command
from rlhfuse.cli.profile import profile
from rlhfuse.timeline import Kind, Span, Timeline, load_chrome, save_chrome

PRIMUS = str(Path(__file__).parents[1] / "profiler/data/primus_pp8")
KINETO = str(Path(__file__).parents[1] / "profiler/data/kineto_recsys")


def test_json_is_one_object_that_keeps_the_contract(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(profile, [PRIMUS, "--json", "--step", "3"]) == 0
    out = capsys.readouterr().out
    summary = json.loads(out)
    assert out.count("\n") == 1
    assert set(summary) == {
        "format",
        "num_ranks",
        "steps",
        "step",
        "wall_s",
        "bubble_fraction",
        "causes",
        "per_rank",
        "schedule",
        "what_if",
        "warnings",
    }
    assert (summary["num_ranks"], summary["step"], len(summary["steps"])) == (8, 3, 20)
    assert sum(summary["causes"].values()) == pytest.approx(8 * summary["wall_s"])
    keys = {"rank", "wall_s", "compute_s", "idle_s", "bubble_fraction", "causes"}
    for rank in summary["per_rank"]:
        assert set(rank) == keys
        assert sum(rank["causes"].values()) == pytest.approx(rank["wall_s"])
    assert summary["schedule"]["name"] == "1F1B"
    assert {"name", "makespan_s", "saving_fraction"} == set(summary["what_if"][0])


@pytest.mark.parametrize(
    ("condition", "code"),
    [
        ("bubble_fraction>0.2", 3),
        ("bubble_fraction > 0.5", 0),
        ("causes.warm_up>=1", 3),
        ("causes.long_tail>0", 0),
        ("wall_s<1e-3", 0),
        ("bubble_fraction", 2),
        ("bubles>0.2", 2),
        ("bubble_fraction>1e", 2),
        ("__import__('os').x>1", 2),
    ],
)
def test_conditions_decide_the_exit_code(
    condition: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [PRIMUS, "--json", "--no-what-if", "--fail-if", condition]
    assert run_command(profile, arguments) == code
    out, err = capsys.readouterr()
    assert (len(out.splitlines()), len(err.splitlines())) == {0: (1, 0), 2: (0, 1), 3: (1, 1)}[code]


def test_an_unknown_bubble_cannot_be_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(profile, [KINETO, "--fail-if", "bubble_fraction>0.2"]) == 2
    assert "bubble_fraction is not known for this trace" in capsys.readouterr().err
    assert run_command(profile, [KINETO, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bubble_fraction"] is None


def test_the_screen_fits_and_is_safe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(profile, [PRIMUS]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 40
    assert "wait_downstream" in out
    lane = "rank\x1b[2J\x07"
    save_chrome(Timeline((Span(lane, 0, 1, Kind.F, "\x1b[31m"),)), tmp_path / "t.json")
    assert run_command(profile, [str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err


def test_pages_and_tables_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page, table, trace = tmp_path / "p.html", tmp_path / "p.csv", tmp_path / "p.json"
    arguments = [PRIMUS, "--html", str(page), "--csv", str(table), "--perfetto", str(trace)]
    arguments.append("--json")
    assert run_command(profile, arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    # The trace has the work and, in between, the idle time by cause: nothing is left uncovered.
    filled = load_chrome(trace)
    assert sum(span.duration_s for span in filled.spans) == pytest.approx(8 * summary["wall_s"])
    assert "idle: warm_up" in {span.name for span in filled.spans}
    text = page.read_text()
    assert "primus_pp8" in text
    assert "Step by step" in text
    rows = table.read_text().splitlines()
    assert len(rows) == 9
    names, first = rows[0].split(","), rows[1].split(",")
    total = sum(float(value) for value in first[4:])
    assert names[:2] == ["rank", "wall_s"]
    assert total == pytest.approx(summary["per_rank"][0]["wall_s"])


def test_a_mistake_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(tmp_path / "no")], [str(tmp_path)], [PRIMUS, "--step", "99"], []):
        assert run_command(profile, arguments or ["--html", "x"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1
