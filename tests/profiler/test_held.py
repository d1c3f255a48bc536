"""Activations held, and replicas told from models that share ranks."""

import pytest

from rlhfuse.profiler.held import held_microbatches
from rlhfuse.profiler.recovery import recover, schedule_name
from rlhfuse.profiler.table import SpanTable
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import gpipe, one_f_one_b, zb_h1
from rlhfuse.schedules.timing import simulate

ONE = Problem(4, (Pipeline.make("m", [0, 1, 2, 3], 8, 1.0, 2.0, weight=1.0),))
BOTH = Problem(
    2, (Pipeline.make("a", [0, 1], 4, 1.0, 2.0), Pipeline.make("c", [1, 0], 4, 1.0, 2.0))
)


@pytest.mark.parametrize(
    "schedule", [one_f_one_b(ONE), gpipe(ONE), zb_h1(ONE), fuse(BOTH, iterations=2)]
)
def test_the_most_that_is_held_is_the_peak_memory(schedule: Schedule) -> None:
    """Every activation counts 1 here, so the schedules' own arithmetic must say the same."""
    curves = held_microbatches(SpanTable.of(simulate(schedule)))
    peaks = [max(held for _, held in curves[f"rank{r}"]) for r in range(len(schedule.rows))]
    assert peaks == [round(peak) for peak in peak_memory(schedule)]
    assert all(curve[-1][1] == 0 for curve in curves.values())


def test_replicas_are_not_fused_models() -> None:
    pipes = [Pipeline.make(f"m{i}", [2 * i, 2 * i + 1], 4, 1.0, 2.0) for i in range(3)]
    replicas = one_f_one_b(Problem(6, tuple(pipes)))
    (found,), _ = recover(simulate(replicas))
    assert schedule_name(found.schedule) == "1F1B, 3 data-parallel replicas"
