"""Megatron's own pipeline loops, labelled from outside: the schedule that ran comes back."""

from pathlib import Path

import pytest

pytest.importorskip("megatron.core")

from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules

from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.record import record
from tests.megatron.tiny import Setting, Trained, init_parallel
from tests.training.ranks import run_ranks


def _train(folder: Path, rank: int, setting: Setting) -> None:
    with on_cpu():
        init_parallel(setting)
        model = Trained(setting)
        stage = parallel_state.get_pipeline_model_parallel_rank()
        run = get_forward_backward_func()
        with (
            record(folder, rank=rank, stage=stage) as recorder,
            recorder.megatron(schedules, num_ranks=setting.pp),
        ):
            for step in (1, 2):
                with recorder.step(step):
                    run(**model.arguments(step))


@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 2])
def test_megatrons_schedule_comes_back(tmp_path: Path, chunks: int) -> None:
    setting = Setting(chunks=chunks, num_microbatches=4)
    run_ranks(2, lambda rank: _train(tmp_path, rank, setting), timeout_s=30, limit_s=90)
    _, summary = explain(open_trace([tmp_path]), 2, critic_scale=None)
    assert summary.schedule is not None, summary.warnings
    assert summary.schedule.name == ("1F1B" if chunks == 1 else "interleaved (2 chunks a rank)")
    assert (summary.schedule.stages, summary.schedule.microbatches) == ([2 * chunks], [4])
    assert summary.bubble_fraction is not None
    assert 0 < summary.bubble_fraction < 1
