"""The recorder: a labelled loop comes back from its files, at almost no cost."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.record import record
from rlhfuse.timeline import Kind, load_chrome

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
    # Without a GPU in it, the trace's labels are the work.
    _, summary = explain(open_trace([tmp_path / "kineto.json"]), None, critic_scale=None)
    assert summary.causes["backward"] == pytest.approx(summary.wall_s)


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


class _Loops:
    """Stands for Megatron's module: loops that call `forward_step` and `backward_step` by name."""

    def __init__(self) -> None:
        self.forward_step: Callable[..., Any] = lambda *args, **kwargs: (torch.ones(1), 3)
        self.backward_step: Callable[..., Any] = lambda *args: None

    def interleaved(self, chunks: int, microbatches: int) -> None:
        outputs = []
        for chunk in range(chunks):
            for microbatch in range(microbatches):
                made = self.forward_step(
                    None, None, None, 4, None, current_microbatch=microbatch, vp_stage=chunk
                )
                outputs.append(made[0])
        for output in reversed(outputs):
            self.backward_step(None, output, None, None, None)


def test_megatrons_loops_are_labelled(tmp_path: Path) -> None:
    loops = _Loops()
    before = loops.forward_step
    with (
        record(tmp_path, rank=1, stage=1, device=CPU) as recorder,
        recorder.megatron(loops, num_ranks=2),
    ):
        for step in (1, 2):
            with recorder.step(step):
                loops.interleaved(chunks=2, microbatches=2)
    assert loops.forward_step is before
    spans = load_chrome(tmp_path / "step_2.rank_1.json").spans
    forward = ["model:1F0", "model:1F1", "model:3F0", "model:3F1"]
    backward = ["model:3B1", "model:3B0", "model:1B1", "model:1B0"]
    assert [span.name for span in spans] == forward + backward
