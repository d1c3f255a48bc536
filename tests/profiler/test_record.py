"""The recorder: a labelled loop comes back from its files, at almost no cost."""

import json
import time
from pathlib import Path

import pytest
import torch

from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.record import record
from rlhfuse.timeline import Kind

CPU = torch.device("cpu")


def test_a_labelled_loop_comes_back(tmp_path: Path) -> None:
    for rank in range(2):
        with record(tmp_path, rank=rank, stage=rank, device=CPU) as recorder:
            for step in (1, 2):
                with recorder.step(step):
                    for microbatch in range(2):
                        with recorder.task("F", microbatch):
                            time.sleep(0.002)
                    with recorder.span(Kind.OPTIMIZER, "step"):
                        time.sleep(0.001)
    trace = open_trace([tmp_path])
    assert trace.steps == (1, 2)
    timeline, summary = explain(trace, 2, critic_scale=None)
    assert [s.name for s in timeline.timeline().of_lane("rank1")] == [
        "model:1F0",
        "model:1F1",
        "step",
    ]
    assert summary.num_ranks == 2
    assert summary.causes["forward"] >= 0.008
    assert summary.causes["optimizer"] >= 0.002


def test_pytorchs_own_trace_carries_the_labels(tmp_path: Path) -> None:
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler,
        record(tmp_path, rank=0, stage=3, device=CPU) as recorder,
        recorder.step(1),
        recorder.task("B", 7, pipeline="actor"),
    ):
        torch.ones(3).sum()
    profiler.export_chrome_trace(str(tmp_path / "kineto.json"))
    names = [e["name"] for e in json.loads((tmp_path / "kineto.json").read_text())["traceEvents"]]
    assert "actor:3B7" in names


def test_a_label_costs_microseconds(tmp_path: Path) -> None:
    with record(tmp_path, rank=0, stage=0, device=CPU) as recorder, recorder.step(1):
        times = []
        for microbatch in range(2000):
            began = time.perf_counter()
            with recorder.task("F", microbatch):
                pass
            times.append(time.perf_counter() - began)
    assert sorted(times)[1000] < 200e-6  # about 15 on an idle core


def test_unknown_operations_are_refused(tmp_path: Path) -> None:
    with (
        record(tmp_path, rank=0, stage=0, device=CPU) as recorder,
        pytest.raises(ValueError, match="'X' is not a valid Op"),
        recorder.task("X", 0),
    ):
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_times_are_those_of_the_stream(tmp_path: Path) -> None:
    device = torch.device("cuda")
    with (
        record(tmp_path, rank=0, stage=0, device=device) as recorder,
        recorder.step(1),
        recorder.task("F", 0),
    ):
        torch.cuda._sleep(20_000_000)  # about 10 ms on the device, nothing on the host
    timeline, _ = explain(open_trace([tmp_path]), 1, critic_scale=None)
    assert timeline.span(0).duration_s > 0.003
