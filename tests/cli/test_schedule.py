"""``rlhfuse schedule`` keeps its contract: one JSON object, exit codes, files."""

from pathlib import Path

import msgspec
import pytest

from rlhfuse.cli.common import MISTAKE, OK, run_command
from rlhfuse.cli.schedule import POLICIES, schedule
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


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("-o none/out.json", "-o is none/out.json, but there is no folder none"),
        ("--plot none/out.png", "--plot is none/out.png, but there is no folder none"),
        ("--pareto 3 --compare", "--compare is about one"),
        ("--pareto 3 -o out.json", "-o is about one"),
    ],
)
def test_what_cannot_be_answered_is_not_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, told: str
) -> None:
    args = [_problem(tmp_path), "--budget-s", "600", *options.split()]
    assert run_command(schedule, args) == MISTAKE
    err = capsys.readouterr().err
    assert told in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_and_a_plot(
    tmp_path: Path, policy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    plot = tmp_path / "plot.svg"
    args = [_problem(tmp_path), "--policy", policy, "--plot", str(plot), "--json"]
    assert run_command(schedule, args) == OK
    summary = msgspec.json.decode(capsys.readouterr().out)
    assert summary["makespan"] >= summary["lower_bound"] - 1e-9
    assert "rank 1" in plot.read_text() or plot.stat().st_size > 5000


GOOD = {"name": "a", "stages": "[0, 1]", "microbatches": "2", "forward": "1", "backward": "2"}
BAD = [
    ("forward", None, "the key 'forward' is missing"),
    ("stages", "[0, 7]", "stage 1 is on rank 7, ranks are 0 to 1"),
    ("forward", "-1", "forward[0] is -1"),
    ("backward", ".nan", "backward[0] is nan"),
    ("backward", ".inf", "backward[0] is inf"),
    ("microbatches", "0", "microbatches is 0"),
    ("microbatches", "2.5", "microbatches is 2.5"),
    ("microbatches", "1000000000", "too many tasks"),
    ("stages", "[0, 0]", "say interleaved: true if meant"),
    ("stages", "[0, true]", "expected a whole number"),
    ("microbatch_weights", "[1]", "microbatch_weights has 1 numbers for 2 micro-batches"),
    ("deadline", "-3", "deadline is -3"),
    ("forwrad", "1", "did you mean 'forward'"),
    ("ranks", "1000000000", "ranks is 1000000000, expected at most"),
    ("ranks", "many", "ranks is 'many'"),
    ("memory_cap", "0", "memory_cap is 0"),
    ("link_latency", "[[0, 9, 1]]", "link_latency names rank pair (0, 9)"),
    ("link_latency", "-1", "link_latency is -1"),
]


@pytest.mark.parametrize(("key", "value", "told"), BAD, ids=[f"{k}={v}" for k, v, _ in BAD])
def test_a_bad_problem_file_exits_2_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: str | None, told: str
) -> None:
    top, fields = {"ranks": "2"}, dict(GOOD)
    (top if key in ("ranks", "memory_cap", "link_latency") else fields)[key] = value or ""
    lines = [f"{k}: {v}" for k, v in top.items()]
    pipeline = ", ".join(f"{k}: {v}" for k, v in fields.items() if v)
    path = tmp_path / "bad.yaml"
    path.write_text("\n".join([*lines, f"pipelines: [{{{pipeline}}}]"]))
    assert run_command(schedule, [str(path)]) == MISTAKE
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert told in err


@pytest.mark.parametrize("text", ["", "[1, 2]", "ranks: [", "{}", "ranks: 2", "layout: 3"])
def test_files_that_are_no_problem_at_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    for name in (str(path), str(tmp_path), str(tmp_path / "none.yaml")):
        assert run_command(schedule, [name]) == MISTAKE
        assert capsys.readouterr().err.count("\n") == 1


def test_compare_shows_every_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [_problem(tmp_path), "--compare", "--iterations", "10", "--split-weight"]
    assert run_command(schedule, [*args, "--json"]) == OK
    answer = msgspec.json.decode(capsys.readouterr().out)
    spans = {line["policy"]: line["summary"]["makespan"] for line in answer["compare"]}
    assert set(spans) == {*POLICIES, "fused, F and B"} - {"fused"}
    assert answer["makespan"] == min([answer["makespan"], *spans.values()]) == 24
    assert {line["summary"]["serial_makespan"] for line in answer["compare"]} == {30}
    assert run_command(schedule, args) == OK
    table = capsys.readouterr().out
    assert all(policy in table for policy in POLICIES)
    assert "critical path" in table


def test_idle_time_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(schedule, [_problem(tmp_path), "--policy", "serial", "--json"]) == OK
    answer = msgspec.json.decode(capsys.readouterr().out)
    for rank in answer["per_rank"]:
        assert rank["busy"] + sum(rank["bubbles"].values()) == pytest.approx(answer["makespan"])
    idle = sum(answer["bubbles"].values())
    assert idle / (2 * answer["makespan"]) == pytest.approx(answer["bubble_fraction"])
    path = answer["critical_path"]
    assert sum(path["pipelines"].values()) + path["waits"] == pytest.approx(answer["makespan"])


def test_front_and_noise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "front.png"
    args = [_problem(tmp_path), "--iterations", "20", "--json"]
    assert run_command(schedule, [*args, "--pareto", "3", "--plot", str(plot)]) == OK
    points = msgspec.json.decode(capsys.readouterr().out)["points"]
    assert [p["makespan"] for p in points] == sorted((p["makespan"] for p in points), reverse=True)
    assert plot.read_bytes()[1:4] == b"PNG"
    assert run_command(schedule, [*args, "--noise", "0.1"]) == OK
    answer = msgspec.json.decode(capsys.readouterr().out)
    assert answer["noise"]["mean"] > answer["makespan"] * 0.99
    assert run_command(schedule, [*args, "--noise", "-1"]) == MISTAKE
    assert "--noise is -1" in capsys.readouterr().err
    assert run_command(schedule, [*args, "--noise", "0.1", "--workers", "2"]) == MISTAKE
    assert "uses one core" in capsys.readouterr().err
    assert run_command(schedule, [*args, "--pareto", "3", "--workers", "2"]) == OK
    assert msgspec.json.decode(capsys.readouterr().out)["points"]


def test_two_layouts_are_placed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "microbatches: 4, forward: 1, backward: 2, weight: 1"
    path = tmp_path / "layout.yaml"
    text = f"layout:\n- {{name: actor, tp: 2, pp: 2, dp: 1, {sizes}}}\n"
    path.write_text(f"{text}- {{name: critic, tp: 1, pp: 2, dp: 2, {sizes}}}\n")
    assert run_command(schedule, [str(path), "--iterations", "20"]) == OK
    assert "1 x 2 ranks of 2 GPUs; K1 = 1, K2 = 1" in capsys.readouterr().err
    path.write_text(f"{text}- {{name: critic, tp: 1, pp: 4, dp: 1, {sizes}}}\n")
    assert run_command(schedule, [str(path)]) == MISTAKE
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "cannot be fused" in told
    assert "near that can: tp 1, pp 2, dp 2" in told


@pytest.mark.parametrize("ending", [".json", ".txt"])
def test_a_schedule_that_was_written_is_read_and_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str
) -> None:
    out, problem = tmp_path / f"out{ending}", _problem(tmp_path)
    assert run_command(schedule, [problem, "--iterations", "5", "--json", "-o", str(out)]) == OK
    found = msgspec.json.decode(capsys.readouterr().out)
    assert run_command(schedule, [problem, "--from", str(out), "--json"]) == OK
    read = msgspec.json.decode(capsys.readouterr().out)
    for key in ("makespan", "peak_memory", "bubbles", "critical_path"):
        assert read[key] == found[key]
    out.write_text(out.read_text().replace("1", "0", 5))
    assert run_command(schedule, [problem, "--from", str(out)]) == MISTAKE
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", ["schedule.yaml", "schedule_layout.yaml"])
def test_the_examples_run(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / name
    assert run_command(schedule, [str(path), "--iterations", "5", "--split-weight", "--json"]) == OK
    answer = msgspec.json.decode(capsys.readouterr().out)
    assert answer["makespan"] < answer["serial_makespan"]


def test_releases_and_deadlines_are_drawn(tmp_path: Path) -> None:
    path, plot = tmp_path / "problem.yaml", tmp_path / "plot.svg"
    path.write_text(PROBLEM.replace("name: critic,", "name: critic, release: 2, deadline: 28,"))
    assert run_command(schedule, [str(path), "--iterations", "5", "--plot", str(plot)]) == OK
    drawn = plot.read_text()  # letters are paths there, with the text as a comment
    for text in ("critic release", "critic deadline", "actor F", "critical path", "rank 1"):
        assert f"<!-- {text} -->" in drawn
