"""What every schedule of every policy keeps, over random problems; and mistakes that are caught."""

import contextlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

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
from rlhfuse.schedules.pareto import Point, pareto
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
        with contextlib.suppress(ValueError):  # it does not take every problem
            found.append(policy.make(problem))
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


@pytest.mark.slow
@given(problems(), st.booleans())
@settings(max_examples=40, deadline=None)
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
        if not any(task.op in (Op.I, Op.W) for _, _, task in schedule.tasks()):
            assert from_flexfusion(to_flexfusion(schedule), asked) == schedule
        if len(asked.pipelines) == 1:
            assert from_torch_csv(to_torch_csv(schedule), asked) == schedule


@pytest.mark.slow
@given(problems(), st.data())
@settings(max_examples=80, deadline=None)
def test_a_mutated_schedule_is_caught_and_marked(problem: Problem, data: st.DataObject) -> None:
    """Whatever is done to one row: what is still accepted keeps every law."""
    schedule = data.draw(st.sampled_from(_schedules(problem, split=True)))
    rows = [list(row) for row in schedule.rows]
    rank = data.draw(st.sampled_from([r for r, row in enumerate(rows) if row]))
    row = rows[rank]
    index = data.draw(st.integers(0, len(row) - 1))
    kind = data.draw(st.sampled_from(["drop", "double", "swap", "move", "rank", "op", "number"]))
    task = row[index]
    always = True
    if kind == "drop":
        row.pop(index)
    elif kind == "double":
        row.insert(data.draw(st.integers(0, len(row))), task)
    elif kind == "rank":
        row.pop(index)
        rows[(rank + 1) % len(rows)].append(task)
        always = len(rows) > 1
    elif kind == "op":
        row[index] = replace(task, op=data.draw(st.sampled_from([o for o in Op if o != task.op])))
    elif kind == "number":
        row[index] = replace(task, microbatch=task.microbatch + data.draw(st.sampled_from([-1, 1])))
    else:
        other = data.draw(st.integers(0, len(row) - 1))
        row.insert(other, row.pop(index))
        if kind == "swap":
            row[index], row[other] = row[other], row[index]
        always = False
    mutated = Schedule(schedule.problem, tuple(tuple(r) for r in rows))
    try:
        mutated.validate()
    except ValueError as error:
        told = str(error)
        assert mutated.rows != schedule.rows
        assert told.count("<-- ERROR HERE") == 1
        assert len(told.splitlines()) == 1 + problem.num_ranks
        return
    assert not always
    _check_by_hand(mutated)
    cap = problem.memory_cap
    assert cap is None or max(_peaks_by_hand(mutated)) <= cap * (1 + REL_TOL)


@given(problems(caps=False), st.booleans())
@settings(max_examples=40, deadline=None)
def test_caps_and_deadlines_below_what_is_there_are_caught(problem: Problem, late: bool) -> None:
    schedule = serial(problem)
    peak, name = max(peak_memory(schedule)), problem.pipelines[0].name
    if late:
        end = max(e for t, e in completion_times(schedule).items() if t.pipeline == name)
        due = problem.pipelines[0].release + 0.9 * (end - problem.pipelines[0].release)
        if not due > problem.pipelines[0].release:
            return
        first = replace(problem.pipelines[0], deadline=due)
        tight = replace(problem, pipelines=(first, *problem.pipelines[1:]))
    else:
        if peak == 0:
            return
        tight = replace(problem, memory_cap=0.9 * peak)
    with pytest.raises(ValueError, match=r"(?s)(deadline|over the cap).*>>.*<<.*ERROR HERE"):
        Schedule(tight, schedule.rows).validate()


@given(problems(), st.booleans(), st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_same_seed_same_schedule(problem: Problem, split: bool, seed: int) -> None:
    one, two = (fuse(problem, iterations=3, seed=seed, split_weight=split).rows for _ in range(2))
    assert one == two


@pytest.mark.slow
@given(problems(), st.booleans())
@settings(max_examples=15, deadline=None)
def test_robust_search_is_legal_repeatable_and_expects_no_more(
    problem: Problem, split: bool
) -> None:
    found = fuse_robust(problem, iterations=6, split_weight=split)
    found.validate()
    check_channels(found)
    assert fuse_robust(problem, iterations=6, split_weight=split) == found
    first = fuse(problem, iterations=1, split_weight=split)
    seen = noise_loss(found, 0.1, samples=32).mean
    assert seen <= noise_loss(first, 0.1, samples=32).mean * (1 + 1e-9)


def test_noise() -> None:
    """No noise, no loss; one task has no loss on average; waiting for the latest of many has."""
    alone = serial(Problem(1, (Pipeline.make("a", [0], 1, 1, 0),)))
    assert noise_loss(alone, 0.0).loss == 0
    assert noise_loss(alone, 0.1, samples=4000).loss == pytest.approx(0, abs=0.01)
    crowd = serial(Problem(4, (Pipeline.make("a", range(4), 8, 1, 2),)))
    small, large = noise_loss(crowd, 0.05), noise_loss(crowd, 0.2)
    assert 0 < small.loss < large.loss < 0.2
    assert small.mean < small.p95
    with pytest.raises(ValueError, match="noise is -1"):
        noise_loss(crowd, -1)


@given(problems(caps=False), st.booleans())
@settings(max_examples=10, deadline=None)
def test_pareto_front_falls(problem: Problem, split: bool) -> None:
    seen: list[Point] = []
    front = pareto(problem, points=4, iterations=5, split_weight=split, on_point=seen.append)
    for before, after in pairwise(front):
        assert before.peak_memory < after.peak_memory
        assert before.makespan > after.makespan
    for point in front:
        point.schedule.validate()
        check_channels(point.schedule)
        assert point.schedule.problem == problem
        assert max(peak_memory(point.schedule)) == point.peak_memory
    assert front[-1].makespan == pytest.approx(min(p.makespan for p in seen))


@pytest.mark.parametrize("seed", range(4))
def test_tasks_that_take_no_time(seed: int) -> None:
    """The second of two neighbours may need the first through a task of no duration elsewhere."""
    there = Pipeline.make("a", [0, 1, 0], 5, [1, 0, 1], [2, 0, 2], interleaved=True)
    back = Pipeline.make("b", [1, 0, 1], 5, [1, 0, 1], [0, 2, 0], weight=0, interleaved=True)
    problem = Problem(2, (there, back), memory_cap=8.0)
    schedule = fuse(problem, iterations=40, seed=seed)
    schedule.validate()
    check_channels(schedule)
