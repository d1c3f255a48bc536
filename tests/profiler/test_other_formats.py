"""Schedules as text, TensorBoard files and rollout dumps: what was written comes back."""

import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.schedules.formats import to_flexfusion, to_torch_csv
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b, zb_h1
from rlhfuse.schedules.timing import makespan

ONE = Problem(4, (Pipeline.make("model", [0, 1, 2, 3], 6, 1.0, 2.0, weight=1.0),))


def test_flexfusion_text_comes_back(tmp_path: Path) -> None:
    both = Problem(
        4,
        (
            Pipeline.make("actor", [0, 1, 2, 3], 4, 3.0, 5.0),
            Pipeline.make("critic", [3, 2, 1, 0], 4, 1.0, 2.0),
        ),
    )
    schedule = fuse(both, iterations=2)
    (tmp_path / "a.txt").write_text(to_flexfusion(schedule))
    _, summary = explain(open_trace([tmp_path]), None, critic_scale=None)
    assert summary.format == "flexfusion"
    assert summary.wall_s == pytest.approx(makespan(schedule))
    assert summary.schedule is not None
    assert summary.schedule.name == "fused"
    assert summary.bubble_fraction == pytest.approx(1 - 4 * 11 * 4 / (4 * makespan(schedule)))


@pytest.mark.parametrize("split", [False, True])
def test_torchs_csv_is_timed_as_usual(tmp_path: Path, split: bool) -> None:
    schedule = zb_h1(ONE) if split else one_f_one_b(ONE)
    (tmp_path / "a.csv").write_text(to_torch_csv(schedule))
    _, summary = explain(open_trace([tmp_path]), None, critic_scale=None)
    assert summary.format == "torch schedule"
    assert summary.wall_s == pytest.approx(makespan(schedule))
    assert summary.schedule is not None
    assert summary.schedule.split_weight == split


def test_a_schedule_that_cannot_run_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("0F0,0B0\n1B0,1F0\n")
    with pytest.raises(ValueError, match=r"a\.csv"):
        open_trace([tmp_path])


def _varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def _bytes(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _event(step: int, scalars: dict[str, float], as_tensor: bool) -> bytes:
    values = b""
    for tag, number in scalars.items():
        body = _bytes(1, tag.encode())
        if as_tensor:  # TensorProto: dtype float, shape, the number's bytes
            tensor = _varint(8) + _varint(1) + _bytes(2, b"") + _bytes(4, struct.pack("<f", number))
            body += _bytes(8, tensor)
        else:
            body += _varint(2 << 3 | 5) + struct.pack("<f", number)
        values += _bytes(1, body)
    return (
        _varint(1 << 3 | 1)
        + struct.pack("<d", 1.7e9)
        + _varint(2 << 3)
        + _varint(step)
        + _bytes(5, values)
    )


def _record(data: bytes) -> bytes:
    return struct.pack("<QI", len(data), 1) + data + struct.pack("<I", 2)


def _events(as_tensor: bool) -> bytes:
    first = _varint(1 << 3 | 1) + struct.pack("<d", 1.7e9) + _bytes(3, b"brain.Event:2")
    rows: list[tuple[int, dict[str, float]]] = [
        (300, {"timing_s/gen": 60.0}),
        (300, {"timing_s/update_actor": 24.0, "timing_s/step": 90.0, "actor/pg_loss": -0.5}),
        (301, {"timing_s/gen": 61.0, "timing_s/step": 91.0}),
    ]
    return b"".join(_record(x) for x in (first, *(_event(s, v, as_tensor) for s, v in rows)))


@pytest.mark.parametrize("as_tensor", [False, True])
def test_tensorboard_scalars_are_step_metrics(tmp_path: Path, as_tensor: bool) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(_events(as_tensor))
    trace = open_trace([tmp_path])
    assert (trace.format, trace.steps) == ("tensorboard", (300, 301))
    _, summary = explain(trace, 300)
    assert summary.causes == pytest.approx({"generate": 60, "compute": 24, "controller": 6})


def test_an_event_file_cut_short_gives_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "x.tfevents").write_bytes(_events(False)[:-9])
    assert open_trace([tmp_path]).steps == (300,)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_damage_ends_in_a_clear_line(tmp_path: Path, data: st.DataObject) -> None:
    kinds = {
        "x.tfevents": _events(True),
        "a.csv": to_torch_csv(one_f_one_b(ONE)).encode(),
        "a.txt": to_flexfusion(one_f_one_b(ONE)).encode(),
        "3.jsonl": b'{"output": "abc", "response_length": 3, "step": 1}\n' * 3,
    }
    name = data.draw(st.sampled_from(sorted(kinds)))
    raw = bytearray(kinds[name])
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(raw) - 1))
        if data.draw(st.booleans()):
            raw[at] = data.draw(st.integers(0, 255))
        else:
            del raw[at : at + data.draw(st.integers(1, 40))]
        if not raw:
            return
    (tmp_path / name).write_bytes(raw)
    told = ""
    try:
        trace = open_trace([tmp_path / name])
        explain(trace, trace.pick(None), critic_scale=None)
    except ValueError as error:
        told = str(error)
    assert "\n" not in told


@pytest.mark.parametrize("how", ["length", "ids", "text"])
def test_rollout_dumps_tell_the_tail(tmp_path: Path, how: str) -> None:
    """99 samples of 100 tokens and one of 1000: nine tenths of the steps run one sample."""
    for step in (1, 2):
        rows: list[dict[str, object]] = []
        for i in range(100):
            length = 1000 if i == 0 else 100
            ways: dict[str, dict[str, object]] = {
                "length": {"response_length": length, "output": "x"},
                "ids": {"output_ids": list(range(length))},
                "text": {"output": "abcd" * length},
            }
            rows.append({"input": "p", "score": 1.0, **ways[how]})
        random.Random(step).shuffle(rows)
        (tmp_path / f"{step}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trace = open_trace([tmp_path])
    assert (trace.format, trace.steps) == ("rollout dump", (1, 2))
    _, summary = explain(trace, 2)
    assert summary.causes == pytest.approx({"generate": 100, "long_tail": 900})
    assert any("90% of generation" in text for text in summary.warnings)
    assert any("guessed" in text for text in summary.warnings) == (how == "text")
    low, high = summary.what_if
    assert 0 < low.saving_fraction <= high.saving_fraction < 0.15


def test_metrics_and_rollouts_of_one_run_are_read_together(tmp_path: Path) -> None:
    """Seconds from the metrics, the tail from the rollouts: a tenth of the steps runs them all."""
    for step in (1, 2, 3):
        values = {"timing_s/gen": 100.0, "timing_s/ref": 4.0, "timing_s/old_log_prob": 6.0}
        row = {"step": step, "data": values | {"timing_s/step": 150.0}}
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    for step in (1, 2):
        rows = [{"output": "x", "response_length": 1000 if i == 0 else 100} for i in range(100)]
        (tmp_path / f"{step}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trace = open_trace([tmp_path])
    assert trace.steps == (1, 2)
    _, summary = explain(trace, None)
    # The barrier hid ten seconds of scoring in the tail; the rest of the tail is its own.
    expected = {"generate": 10, "stage_wait": 10, "long_tail": 80, "score": 10, "controller": 40}
    assert summary.causes == pytest.approx(expected)
    assert [what.makespan_s for what in summary.what_if] == pytest.approx([145.87, 140], abs=0.1)
    (tmp_path / "1.jsonl").rename(tmp_path / "8.jsonl")
    (tmp_path / "2.jsonl").unlink()
    with pytest.raises(ValueError, match="rollouts of steps 8, metrics of steps 1, 2, 3"):
        open_trace([tmp_path])
