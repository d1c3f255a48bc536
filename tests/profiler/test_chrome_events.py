"""Chrome event lists by other makers: however they name things, the same timeline comes out."""

import json
from pathlib import Path

import pytest

from rlhfuse.profiler.explain import explain
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
    unmapped = explain(open_trace([tmp_path]), 7)[1]
    assert unmapped.bubble_fraction is None
    assert any("no event says its micro-batch" in text for text in unmapped.warnings)
    names = FieldNames(microbatch=("batchlet",), stage=("floor",))
    mapped = explain(open_trace([tmp_path], names), 7, critic_scale=None)[1]
    assert mapped.bubble_fraction == pytest.approx(3 / 9)


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
