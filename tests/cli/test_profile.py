"""``rlhfuse profile``: the contract of its output and of its exit codes."""

import json
import threading
from pathlib import Path

import pytest
from msgspec.structs import replace

from rlhfuse.cli.common import run_command
from rlhfuse.cli.profile import profile
from rlhfuse.cli.profile_output import print_summary
from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.summary import WhatIf, summarize
from rlhfuse.schedules.problem_file import read_problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import makespan
from rlhfuse.timeline import Kind, Span, Timeline, save_chrome

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
    assert {"name", "makespan_s", "saving_fraction", "bubble_recovered"} == set(
        summary["what_if"][0]
    )
    for what in summary["what_if"]:
        saved = what["bubble_recovered"] * summary["bubble_fraction"]
        assert saved == pytest.approx(what["saving_fraction"])


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


def test_a_saving_larger_than_the_bubble_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    half = WhatIf("half the work", 1.0, saving_fraction=0.5)
    lanes = [Span("rank0", 0, 2, Kind.F, "F0"), Span("rank1", 0, 1.5, Kind.F, "F1")]
    for saved, explained in ((half, True), (replace(half, saving_fraction=0.1), False)):
        print_summary(summarize("made up", [0], 0, Timeline(tuple(lanes)), what_if=[saved]))
        assert ("over 100 % of the bubble" in capsys.readouterr().out) is explained


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
    events = json.loads(trace.read_text())["traceEvents"]
    pieces = [event for event in events if event["ph"] == "X"]
    assert sum(event["dur"] for event in pieces) / 1e6 == pytest.approx(8 * summary["wall_s"])
    assert "idle: warm_up" in {event["name"] for event in pieces}
    # Every message once: 16 micro-batches over 7 links, both ways.
    for end in "sf":
        assert len({e["id"] for e in events if e["ph"] == end}) == 2 * 7 * 16
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


def test_measured_costs_are_a_problem(tmp_path: Path) -> None:
    costs, picture = tmp_path / "costs.yaml", tmp_path / "p.svg"
    arguments = [PRIMUS, "--costs", str(costs), "--plot", str(picture), "--no-what-if"]
    assert run_command(profile, arguments) == 0
    problem = read_problem(costs)
    (pipe,) = problem.pipelines
    assert (problem.num_ranks, pipe.num_stages, pipe.num_microbatches) == (8, 8, 16)
    assert picture.read_text().lstrip().startswith("<?xml")
    # The problem's own best standard schedule takes about what was measured.
    summary = explain(open_trace([Path(PRIMUS)]), 20, critic_scale=None)[1]
    assert makespan(one_f_one_b(problem)) == pytest.approx(summary.wall_s, rel=0.03)


def test_a_given_critic_is_fused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = ", ".join(map(str, range(7, -1, -1)))
    text = (
        "ranks: 8\npipelines:\n- {name: critic, stages: [STAGES], microbatches: 16, forward: F}\n"
    )
    predicted = []
    for forward in (0.01, 0.06):
        given = text.replace("STAGES", stages).replace("F}", f"{forward}, backward: 0.07}}")
        (tmp_path / "c.yaml").write_text(given)
        assert run_command(profile, [PRIMUS, "--json", "--critic", str(tmp_path / "c.yaml")]) == 0
        found = json.loads(capsys.readouterr().out)["what_if"]
        predicted.append(next(x for x in found if "with a critic" in x["name"])["makespan_s"])
    assert predicted[0] < predicted[1]


@pytest.mark.slow
def test_a_run_in_progress_is_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    (folder / "timeline").mkdir(parents=True)

    def write(step: int) -> None:
        spans = (
            Span("rank0", 0, 1, Kind.GENERATE, "g"),
            Span("rank1", 0, step, Kind.GENERATE, "g"),
        )
        save_chrome(Timeline(spans), folder / "timeline" / f"step_{step}.json")

    for step in (1, 2):
        write(step)
    later = threading.Timer(0.7, write, (3,))
    later.start()
    arguments = [str(folder), "--attach", "--stop-after-s", "2", "--fail-if", "wall_s>2.5"]
    assert run_command(profile, arguments) == 3
    later.join()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step 2", "step 3"]
    assert "33.3% not computing (long_tail 33%)" in lines[1]


@pytest.mark.parametrize("name", ["ndtimeline", "stragglers", "megatron", "nosuch"])
def test_presets_have_names(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    event = {"ph": "X", "name": "forward-compute", "pid": 1, "tid": 1, "ts": 0, "dur": 5}
    event["args"] = {"mb": 0, "mb_id": 0, "microbatch": 0, "pp_rank": 0}
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": [event]}))
    code = run_command(profile, [str(tmp_path / "t.json"), "--map", name, "--json"])
    assert code == (2 if name == "nosuch" else 0)
    out, err = capsys.readouterr()
    assert ("neither a file nor one of usual, ndtimeline" in err) == (name == "nosuch")
    assert name == "nosuch" or json.loads(out)["causes"] == {"forward": pytest.approx(5e-6)}
