"""Chrome event lists by other makers: however they name things, the same timeline comes out."""

import json
from pathlib import Path

import pytest

from rlhfuse.profiler.explain import explain, explain_step
from rlhfuse.profiler.readers.chrome_events import FieldNames
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import makespan, simulate

SCHEDULE = one_f_one_b(Problem(4, (Pipeline.make("model", [0, 1, 2, 3], 6, 0.01, 0.02),)))
WORDS = {"F": "forward_compute", "B": "backward_compute"}


def _events(mb: str, stage: str, paired: bool) -> list[dict[str, object]]:
    events: list[dict[str, object]] = []
    for step in (7, 8):
        for span in simulate(SCHEDULE).spans:
            rank = int(span.lane.removeprefix("rank"))
            args = {"step": step, mb: span.args["microbatch"], stage: span.args["pp_stage"]}
            shared = {"name": WORDS[span.kind.value], "pid": f"worker {rank}", "tid": 1}
            start, end = (1e6 * (x + 10 * step) for x in (span.start_s, span.end_s))
            if paired:
                events.append({**shared, "ph": "B", "ts": start, "args": args})
                events.append({**shared, "ph": "E", "ts": end})
            else:
                events.append({**shared, "ph": "X", "ts": start, "dur": end - start, "args": args})
        events.append({"ph": "M", "name": "process_name", "pid": 1, "args": {"name": "x"}})
    return sorted(events, key=lambda e: (float(str(e.get("ts", 0))), e["ph"] != "E"))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("mb", "stage"), [("mb_id", "pp_rank"), ("microbatch", "stage")])
def test_usual_names_are_known(tmp_path: Path, mb: str, stage: str, paired: bool) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": _events(mb, stage, paired)}))
    trace = open_trace([tmp_path])
    assert (trace.format, trace.steps) == ("chrome events", (7, 8))
    timeline, summary = explain(trace, 8, critic_scale=None)
    truth = simulate(SCHEDULE)
    assert [s.name for s in timeline.timeline().of_lane("rank2")] == [
        s.name for s in truth.of_lane("rank2")
    ]
    assert summary.wall_s == pytest.approx(makespan(SCHEDULE))
    assert summary.schedule is not None
    assert summary.schedule.name == "1F1B"
    assert summary.bubble_fraction == pytest.approx(3 / 9)  # (p - 1) / (m + p - 1)


def test_other_names_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(
        json.dumps({"traceEvents": _events("batchlet", "floor", False)})
    )
    unmapped = explain(open_trace([tmp_path]), 7, critic_scale=None)[1]
    assert any("no event says its micro-batch" in text for text in unmapped.warnings)
    names = FieldNames(microbatch=("batchlet",), stage=("floor",))
    mapped = explain(open_trace([tmp_path], names), 7, critic_scale=None)[1]
    assert mapped.bubble_fraction == pytest.approx(3 / 9)
    assert not any("no event says" in text for text in mapped.warnings)


@pytest.mark.parametrize("replicas", [1, 2])
def test_order_numbers_what_nobody_did(tmp_path: Path, replicas: int) -> None:
    """Two steps in one list with an optimizer between, no step, no micro-batch in any event."""
    events = _events("batchlet", "stage", False)
    for event in events:
        if "args" in event and "ts" in event:
            event["args"] = {"stage": int(str(event["pid"]).removeprefix("worker "))}
    ends: list[dict[str, object]] = [
        {"ph": "X", "name": "optimizer", "pid": f"worker {r}", "tid": 1, "ts": 7.9e7, "dur": 9e3}
        for r in range(4)
    ]
    copies = [
        {**event, "pid": f"worker {int(str(event['pid']).removeprefix('worker ')) + 4 * copy}"}
        for event in events + ends
        if event["ph"] != "M"
        for copy in range(replicas)
    ]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": copies}))
    found = explain_step(open_trace([tmp_path]), None, critic_scale=None)
    assert len(found.rounds) == 2
    for training in found.rounds:
        assert training.problem.num_ranks == 4 * replicas
        for rank, row in enumerate(training.schedule.rows):
            expected = [str(task).partition(":")[2] for task in SCHEDULE.rows[rank % 4]]
            assert [str(task).partition(":")[2] for task in row] == expected
    assert found.summary.schedule is not None
    assert found.summary.schedule.name.startswith("1F1B")


@pytest.mark.parametrize(("gone", "why"), [(True, "unequal numbers"), (False, "would begin")])
def test_an_order_that_tells_nothing_is_not_believed(tmp_path: Path, gone: bool, why: str) -> None:
    events = [event for event in _events("batchlet", "floor", False) if event["ph"] != "M"]
    if gone:
        events.pop(3)
    else:  # stages the other way round: results would be used before they are made
        for event in events:
            event["pid"] = f"worker {3 - int(str(event['pid']).removeprefix('worker '))}"
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": events}))
    summary = explain(open_trace([tmp_path]), 7, critic_scale=None)[1]
    assert summary.bubble_fraction is None
    assert why in " ".join(summary.warnings)


def test_a_wrong_pattern_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": _events("mb", "stage", False)}))
    with pytest.raises(ValueError, match="is not a regular expression"):
        open_trace([tmp_path], FieldNames(forward="(")).load(7)


def test_threads_may_carry_the_ranks(tmp_path: Path) -> None:
    """All ranks as threads of one process, named so."""
    events = _events("mb", "stage", paired=True)
    for event in events:
        if "tid" in event:
            event["tid"], event["pid"] = str(event["pid"]), 7
    names: list[dict[str, object]] = [
        {"ph": "M", "name": "thread_name", "pid": 7, "tid": f"worker {r}"}
        | {"args": {"name": f"host a, rank {r} of 4"}}
        for r in range(4)
    ]
    (tmp_path / "t.json").write_text(json.dumps({"traceEvents": names + events}))
    _, summary = explain(open_trace([tmp_path]), 7, critic_scale=None)
    assert summary.num_ranks == 4
    assert summary.bubble_fraction == pytest.approx(3 / 9)
