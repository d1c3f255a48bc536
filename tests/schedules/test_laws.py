"""What every schedule of every policy keeps, over random problems; and mistakes that are caught."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.schedules.bounds import latency_bound, memory_bound
from rlhfuse.schedules.checks import completion_times, peak_memory
from rlhfuse.schedules.formats import (
    from_flexfusion,
    from_torch_csv,
    schedule_from_json,
    schedule_to_json,
    to_flexfusion,
    to_torch_csv,
)
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import REL_TOL, Op, Pipeline, Problem, Schedule, Task, rows_from_text
from rlhfuse.schedules.problem_file import problem_from_tree, problem_to_tree
from rlhfuse.schedules.robust import fuse_robust, noise_loss
from rlhfuse.schedules.standard import serial
from rlhfuse.schedules.summary import standard_policies
from rlhfuse.schedules.timing import check_channels, makespan
from tests.schedules.problems import problems


def _schedules(problem: Problem, split: bool) -> list[Schedule]:
    """By `fuse` and by every policy that takes the problem."""
    found = [fuse(problem, iterations=1, split_weight=split)]
    for policy in standard_policies():
        try:
            found.append(policy.make(problem))
        except ValueError as error:
            assert "\n" not in str(error), "a policy's refusal is one line"
    return found


def _check_by_hand(schedule: Schedule) -> None:
    """The laws of a legal schedule, written once more without the code that validates."""
    problem, ends = schedule.problem, completion_times(schedule)
    assert max(Counter(task for row in schedule.rows for task in row).values()) == 1
    for pipe in problem.pipelines:
        for stage, rank in enumerate(pipe.stages):
            row = [t for t in schedule.rows[rank] if (t.pipeline, t.pp_stage) == (pipe.name, stage)]
            for ops in ("F", "BI", "BW"):
                order = [task.microbatch for task in row if task.op.value in ops]
                once = ops == "F" or not pipe.forward_only
                assert order == (list(range(pipe.num_microbatches)) if once else [])
            for task in row:
                scale = pipe.microbatch_weights[task.microbatch]
                start = ends[task] - pipe.duration(task.op, stage) * scale
                assert start >= _earliest(schedule, pipe, task, ends) - 1e-6


def _earliest(schedule: Schedule, pipe: Pipeline, task: Task, ends: Mapping[Task, float]) -> float:
    """When the input of `task` is there, and the task before it is over."""
    stage, rank, mb = task.pp_stage, pipe.stages[task.pp_stage], task.microbatch
    row = schedule.rows[rank]
    earliest = ends[row[row.index(task) - 1]] if row[0] != task else 0.0
    needs = [(Op.I, stage)] if task.op is Op.W else []
    if task.op is Op.F:
        needs = [(Op.F, stage - 1)] if stage else []
        earliest = max(earliest, 0.0 if stage else pipe.release)
    elif task.op is not Op.W:
        needs = [(Op.F, stage), (Op.B, stage + 1), (Op.I, stage + 1)]
    for op, other in needs:
        source = Task(pipe.name, op, other, mb)
        if source in ends:
            link = schedule.problem.latency(pipe.stages[other], rank)
            earliest = max(earliest, ends[source] + link)
    return earliest


def _peaks_by_hand(schedule: Schedule) -> list[float]:
    """Highest memory of each rank: what begins counts at once, what ends counts no more."""
    peaks = []
    for row in schedule.rows:
        held = peak = 0.0
        for task in row:
            pipe = schedule.problem.pipeline(task.pipeline)
            scale = pipe.microbatch_weights[task.microbatch]
            whole = pipe.activation[task.pp_stage] * scale
            kept = pipe.activation_after_input[task.pp_stage] * scale
            held += whole if task.op is Op.F else 0.0
            peak = max(peak, held)
            held -= {Op.F: whole * pipe.forward_only, Op.B: whole, Op.I: whole - kept, Op.W: kept}[
                task.op
            ]
            peak = max(peak, held)
        assert held == pytest.approx(0, abs=1e-9)
        peaks.append(peak)
    return peaks


@given(problems(), st.booleans())
@settings(max_examples=300, deadline=None)
def test_every_policy_is_legal_and_no_better_than_the_bounds(problem: Problem, split: bool) -> None:
    for schedule in _schedules(problem, split):
        schedule.validate()
        _check_by_hand(schedule)
        peaks = _peaks_by_hand(schedule)
        assert peaks == pytest.approx(peak_memory(schedule))
        assert problem.memory_cap is None or max(peaks) <= problem.memory_cap * (1 + REL_TOL)
        check_channels(schedule)
        length = makespan(schedule)
        asked = schedule.problem
        assert length >= latency_bound(asked, split_weight=True) * (1 - 1e-9)
        if not any(task.op is Op.W for _, _, task in schedule.tasks()):
            assert length >= latency_bound(asked, split_weight=False) * (1 - 1e-9)
        assert max(peak_memory(schedule)) >= memory_bound(asked, length) * (1 - 1e-9)
        assert rows_from_text(schedule.to_text()) == schedule.rows
        assert schedule_from_json(schedule_to_json(schedule)) == schedule
        assert problem_from_tree(problem_to_tree(asked)) == asked
