"""Readers: real traces give the numbers an independent recomputation gives; broken ones a line."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhfuse.profiler.attribution import attribute
from rlhfuse.profiler.causes import IDLE, MOVEMENT, WORK
from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.readers.stream import TraceStream
from rlhfuse.profiler.table import SpanTable
from rlhfuse.timeline import Kind, Span, Timeline, save_chrome

DATA = Path(__file__).parent / "data"


@pytest.mark.parametrize("step", [1, 2, 20])
def test_primus_agrees_with_a_plain_recomputation(step: int) -> None:
    trace = open_trace([DATA / "primus_pp8"])
    assert (trace.format, trace.steps) == ("primus", tuple(range(1, 21)))
    _, summary = explain(trace, step, critic_scale=None)
    files = [json.loads((DATA / f"primus_pp8/pp_rank_{r}.json").read_text()) for r in range(8)]
    rows = [file[str(step)] for file in files]
    first = min(row["fwd_start"][0] for row in rows)
    wall_ms = max(max(row["bwd_end"]) for row in rows) - first
    for rank, row in zip(summary.per_rank, rows, strict=True):
        busy_ms = sum(
            end - start
            for kind in ("fwd", "bwd")
            for start, end in zip(row[f"{kind}_start"], row[f"{kind}_end"], strict=True)
        )
        assert rank.compute_s == pytest.approx(busy_ms / 1e3, rel=1e-9)
        assert rank.wall_s == pytest.approx(wall_ms / 1e3, rel=1e-9)
        assert sum(rank.causes.values()) == pytest.approx(rank.wall_s)
    assert summary.bubble_fraction == pytest.approx(
        sum(r.idle_s / r.wall_s for r in summary.per_rank) / 8
    )
    # Rank 0 works from the first to the last moment: its own total is the step's wall time.
    assert summary.wall_s == pytest.approx(rows[0]["total"] / 1e3, rel=2e-3)


@pytest.mark.parametrize("step", [None, 551, 552])
def test_kineto_agrees_with_a_plain_recomputation(step: int | None) -> None:
    trace = open_trace([DATA / "kineto_recsys"])
    assert (trace.format, trace.steps) == ("kineto", (551, 552))
    loaded = trace.load(step)
    explained = attribute(loaded.timeline)
    for number, lane in enumerate(explained.lanes):
        busy_s, compute_s = _plain_busy(number, step)
        found = lane.causes
        assert sum(found.get(cause, 0) for cause in WORK) == pytest.approx(compute_s, abs=2e-6)
        moving = sum(found.get(cause, 0) for cause in MOVEMENT)
        assert lane.compute_s + moving == pytest.approx(busy_s, abs=2e-6)
        assert sum(found.get(cause, 0) for cause in IDLE) == pytest.approx(lane.wall_s - busy_s)


def test_all_to_all_is_not_called_a_pipeline() -> None:
    trace = open_trace([DATA / "kineto_recsys"])
    _, summary = explain(trace, 552)
    assert summary.bubble_fraction is None
    assert all(rank.bubble_fraction is None for rank in summary.per_rank)
    assert any("nccl:all_to_all" in text for text in summary.warnings)
    assert any("2 of the job's 128 ranks" in text for text in summary.warnings)


def _plain_busy(rank: int, step: int | None) -> tuple[float, float]:
    """Seconds with any kernel or copy, and with a computing kernel, by marking microseconds."""
    path = DATA / f"kineto_recsys/sampled_rank-{rank}.json.gz"
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if step is not None:
        window = next(e for e in events if e["name"] == f"ProfilerStep#{step}")
        begin, finish = window["ts"], window["ts"] + window["dur"]
        device = [e for e in device if begin <= e["ts"] < finish]
    marks: dict[bool, set[int]] = {True: set(), False: set()}
    for event in device:
        computes = event["cat"] == "kernel" and not event["name"].startswith("nccl")
        marks[computes].update(range(int(event["ts"]), int(event["ts"] + event["dur"])))
    return len(marks[True] | marks[False]) / 1e6, len(marks[True]) / 1e6


def _kineto(rank: int, events: list[dict[str, object]], world: int = 2) -> dict[str, object]:
    info = {"backend": "nccl", "pg_config": [{"ranks": [0, 1]}], "rank": rank, "world_size": world}
    return {"schemaVersion": 1, "distributedInfo": info, "traceEvents": events}


def _kernel(name: str, ts: float, dur: float, cat: str = "kernel") -> dict[str, object]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "args": {"stream": 7}}


def test_labelled_pipeline_work_gives_a_bubble(tmp_path: Path) -> None:
    for rank, late in ((0, 0), (1, 100)):
        events = [
            _kernel("gemm", 1000 + late, 90),
            _kernel(f"PP:{rank}F0", 1000 + late, 100, "gpu_user_annotation"),
        ]
        (tmp_path / f"r{rank}.json").write_text(json.dumps(_kineto(rank, events)))
    trace = open_trace([tmp_path])
    _, summary = explain(trace, None, critic_scale=None)
    assert summary.bubble_fraction == pytest.approx(0.55)
    # What computes inside a label is its work; the rest of the label is a gap in it.
    for row in summary.per_rank:
        assert row.causes["forward"] == pytest.approx(9e-5)
        assert row.causes["host_gap"] == pytest.approx(1e-5)
    assert summary.per_rank[1].causes["warm_up"] == pytest.approx(1e-4)


def test_a_trace_cut_short_gives_what_it_has(tmp_path: Path) -> None:
    text = json.dumps(_kineto(0, [_kernel(f"k{i}", 10 * i, 5) for i in range(5000)]))
    whole, cut = tmp_path / "whole" / "r0.json.gz", tmp_path / "cut" / "r0.json.gz"
    for path in (whole, cut):
        path.parent.mkdir()
        path.write_bytes(gzip.compress(text.encode()))
    cut.write_bytes(whole.read_bytes()[:-2000])
    complete = SpanTable.of(open_trace([whole.parent]).load(None).timeline).spans()
    partial = open_trace([cut.parent]).load(None)
    some = SpanTable.of(partial.timeline).spans()
    assert 0 < len(some) < len(complete) == 5000
    assert any("cut short" in text for text in partial.warnings)
    assert some == complete[: len(some)]


@pytest.mark.parametrize("chunk", [64, 1000, 1 << 20])
def test_streaming_equals_reading_at_once(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhfuse.profiler.readers.stream._CHUNK", chunk * 8)
    path = DATA / "kineto_recsys/sampled_rank-0.json.gz"
    stream = TraceStream(path)
    events = list(stream.events(dict))
    assert events == json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert stream.broken == ""
    assert b'"world_size": 128' in stream.head


def test_ranks_of_different_jobs_are_refused(tmp_path: Path) -> None:
    for rank, world in ((0, 2), (1, 4)):
        data = json.dumps(_kineto(rank, [_kernel("k", 0, 1)], world))
        (tmp_path / f"{rank}.json").write_text(data)
    with pytest.raises(ValueError, match="ranks of different jobs"):
        open_trace([tmp_path])


@pytest.mark.parametrize(
    ("steps", "known", "told"),
    [
        ([(1, 2), (2, 3)], (2,), "steps 1, 3 are not on all ranks"),
        ([(1, 2), ()], (), "some ranks are not cut into steps"),
        ([(1, 2), (3, 4)], None, r"no step in common \(rank 0: 1-2; rank 1: 3-4\)"),
    ],
)
def test_mixed_steps_are_told(
    tmp_path: Path, steps: list[tuple[int, ...]], known: tuple[int, ...] | None, told: str
) -> None:
    for rank, mine in enumerate(steps):
        events = [_kernel("k", 100 * n + 1, 9) for n in (1, 2, 3, 4)]
        for n in mine:
            events.append(_kernel(f"ProfilerStep#{n}", 100 * n, 99, "user_annotation"))
        (tmp_path / f"{rank}.json").write_text(json.dumps(_kineto(rank, events)))
    if known is None:
        with pytest.raises(ValueError, match=told):
            open_trace([tmp_path])
        return
    trace = open_trace([tmp_path])
    assert trace.steps == known
    assert any(told in text for text in trace.load(trace.pick(None)).warnings)


def test_clear_lines_for_what_is_no_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        open_trace([tmp_path / "nothing"])
    with pytest.raises(ValueError, match="no files to profile"):
        open_trace([tmp_path])
    (tmp_path / "a.json").write_text('{"some": "thing"}')
    with pytest.raises(ValueError, match="no trace of a known format"):
        open_trace([tmp_path])
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(b"x" * 5000)[:20])
    with pytest.raises(ValueError, match="cut short"):
        open_trace([tmp_path])


def test_missing_primus_ranks_are_named(tmp_path: Path) -> None:
    for rank in (0, 3):
        text = (DATA / f"primus_pp8/pp_rank_{rank}.json").read_text()
        (tmp_path / f"pp_rank_{rank}.json").write_text(text)
    with pytest.raises(ValueError, match=r"ranks \[1, 2\] are missing"):
        open_trace([tmp_path])


def test_formats_are_found_by_content(tmp_path: Path) -> None:
    save_chrome(Timeline((Span("rank0", 0, 1, Kind.F, "a:0F0"),)), tmp_path / "kineto.json")
    trace = open_trace([tmp_path / "kineto.json"])
    assert trace.format == "rlhfuse timeline"
    assert trace.load(trace.pick(None)).timeline.wall_s == 1
    (tmp_path / "other.json").write_text((DATA / "primus_pp8/pp_rank_0.json").read_text())
    with pytest.raises(ValueError, match="different formats"):
        open_trace([tmp_path])


def test_a_step_that_is_not_there_is_named() -> None:
    trace = open_trace([DATA / "primus_pp8"])
    with pytest.raises(ValueError, match=r"--step 21: not in the trace \(steps: 1-20\)"):
        trace.pick(21)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damaged_files_end_in_a_clear_line(tmp_path: Path, data: st.DataObject) -> None:
    """Any mutation of a file either reads, or raises ValueError: never anything else."""
    small = json.dumps(_kineto(0, [_kernel("ncclKernel_SendRecv", i, 1) for i in range(4)]))
    primus = json.dumps(
        {"1": {"total": 3.0, "fwd_start": [0], "fwd_end": [1], "bwd_start": [1], "bwd_end": [3]}}
    )
    raw = bytearray(data.draw(st.sampled_from([small.encode(), primus.encode()])))
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(raw) - 1))
        match data.draw(st.integers(0, 2)):
            case 0:
                raw[at] = data.draw(st.integers(0, 255))
            case 1:
                del raw[at : at + data.draw(st.integers(1, 30))]
            case _:
                raw[at:at] = data.draw(st.sampled_from([b"null", b"1e999", b"-", b'"', b"{", b"]"]))
        if not raw:
            return
    path = tmp_path / "rank0.json"
    path.write_bytes(raw)
    told = ""
    try:
        trace = open_trace([path])
        explain(trace, trace.pick(None), critic_scale=None)
    except ValueError as error:
        told = str(error)
    assert "\n" not in told


@pytest.mark.parametrize("number", ["1e300", "-1e300", "1e999", "NaN", "-0.0", "1e18"])
@pytest.mark.parametrize("where", ["chrome", "primus", "kineto"])
def test_impossible_times_end_in_a_clear_line(tmp_path: Path, number: str, where: str) -> None:
    text = {
        "chrome": '{"traceEvents": [{"ph": "X", "name": "f", "pid": 1, "ts": T, "dur": 5}, '
        '{"ph": "X", "name": "f", "pid": 1, "ts": 1, "dur": T}]}',
        "primus": '{"1": {"total": 1, "fwd_start": [0], "fwd_end": [1], '
        '"bwd_start": [1], "bwd_end": [T]}}',
        "kineto": json.dumps(_kineto(0, [_kernel("k", 1, 2), _kernel("k", 4711, 2)])).replace(
            "4711", "T"
        ),
    }[where]
    (tmp_path / "rank0.json").write_text(text.replace("T", number))
    told = ""
    try:
        trace = open_trace([tmp_path])
        _, summary = explain(trace, trace.pick(None), critic_scale=None)
        assert 0 <= summary.wall_s < 1e13
    except ValueError as error:
        told = str(error)
    assert "\n" not in told
