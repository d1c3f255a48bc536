"""Laws of fused schedules, over random problems."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.schedules.bounds import latency_bound, memory_bound
from rlhfuse.schedules.checks import completion_times, peak_memory
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule, rows_from_text
from rlhfuse.schedules.standard import serial, serial_makespan
from rlhfuse.schedules.timing import check_channels, makespan, simulate


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Small problems with everything that the language can say."""
    num_ranks = draw(st.integers(1, 4))
    times = st.integers(1, 6)
    pipelines = []
    for name in ("actor", "critic", "reward")[: draw(st.integers(1, 3))]:
        home = list(draw(st.permutations(range(num_ranks))))
        stages = home[: draw(st.integers(1, num_ranks))]
        interleaved = draw(st.booleans()) and draw(st.booleans())
        stages = stages + stages[::-1] if interleaved else stages
        forward_only = name == "reward" and draw(st.booleans())
        m = draw(st.integers(1, 5))
        forward = [draw(times) for _ in stages]
        backward = [0 if forward_only else 2 * draw(times) for _ in stages]
        pipelines.append(
            Pipeline.make(
                name,
                stages,
                m,
                forward,
                backward,
                weight=[b / 2 for b in backward],
                activation=draw(st.sampled_from([0.0, 1.0, 1.5])),
                microbatch_weights=[draw(st.sampled_from([0.5, 1.0, 2.0])) for _ in range(m)],
                release=draw(st.sampled_from([0.0, 3.0])),
                interleaved=interleaved,
            )
        )
    least = memory_bound(Problem(num_ranks, tuple(pipelines)), float("inf"))
    cap = draw(st.sampled_from([None, 1.0, 2.0])) if least else None
    return Problem(
        num_ranks,
        tuple(pipelines),
        None if cap is None else cap * least,
        draw(st.sampled_from([0.0, 0.5])),
    )


@given(problems(), st.booleans(), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_fused_is_valid_executable_and_between_bound_and_serial(
    problem: Problem, split: bool, seed: int
) -> None:
    schedule = fuse(problem, iterations=2, seed=seed, split_weight=split)
    schedule.validate()
    check_channels(schedule)
    length = makespan(schedule)
    assert length <= makespan(serial(problem)) + 1e-9
    assert length >= latency_bound(problem, split_weight=split) - 1e-9
    assert max(peak_memory(schedule)) >= memory_bound(problem, length) - 1e-9
    assert rows_from_text(schedule.to_text()) == schedule.rows


@given(problems(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_compiled_simulation_equals_the_plain_reference(problem: Problem, split: bool) -> None:
    schedule = fuse(problem, iterations=1, split_weight=split)
    ends = completion_times(schedule)
    spans = simulate(schedule).spans
    assert {span.name: span.end_s for span in spans} == pytest.approx(
        {str(task): end for task, end in ends.items()}
    )


@given(problems(), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_mutated_schedule_is_caught(problem: Problem, seed: int) -> None:
    rng = np.random.default_rng(seed)
    schedule = serial(problem)
    rank = int(rng.choice([r for r, row in enumerate(schedule.rows) if row]))
    row = list(schedule.rows[rank])
    index = int(rng.integers(len(row)))
    kind = int(rng.integers(3))
    if kind == 0:
        row.pop(index)
    elif kind == 1:
        row.insert(index, row[index])
    else:
        same = [
            i
            for i, t in enumerate(row)
            if (t.pipeline, t.pp_stage, t.op)
            == (row[index].pipeline, row[index].pp_stage, row[index].op)
            and i != index
        ]
        if not same:
            return
        row[index], row[same[0]] = row[same[0]], row[index]
    rows = (*schedule.rows[:rank], tuple(row), *schedule.rows[rank + 1 :])
    with pytest.raises(ValueError, match=r"(?s).*(ERROR HERE|circle)"):
        Schedule(problem, rows).validate()


def test_same_seed_and_iterations_give_the_same_schedule() -> None:
    problem = Problem(
        4,
        (
            Pipeline.make("actor", [0, 1, 2, 3], 8, 1, 2, weight=1),
            Pipeline.make("critic", [3, 2, 1, 0], 8, 0.7, 1.5, weight=0.7),
        ),
        memory_cap=6.0,
    )
    first = fuse(problem, iterations=5, seed=3, split_weight=True)
    assert fuse(problem, iterations=5, seed=3, split_weight=True).rows == first.rows
    assert makespan(first) < serial_makespan(problem)


def test_an_infeasible_cap_names_the_least_one() -> None:
    """Of all pipelines, exactly: what is told is enough."""
    actor = Pipeline.make("actor", [0, 1], 4, 1, 2, activation=1.5)
    critic = Pipeline.make("critic", [1, 0], 4, 1, 2, activation=7 / 3)
    problem = Problem(2, (actor, critic))
    with pytest.raises(ValueError, match=r"'actor'; .*least cap that does is 2\.33333333$"):
        fuse(problem, memory_cap=1.0)
    fuse(problem, memory_cap=2.33333333, iterations=1).validate()


@pytest.mark.parametrize("split", [False, True])
def test_deadlines_are_kept(split: bool) -> None:
    """The critic alone needs 16.5 time units; serial (actor first) ends it far later."""
    critic = Pipeline.make("critic", [3, 2, 1, 0], 8, 0.5, 1, weight=0.5, deadline=20.0)
    actor = Pipeline.make("actor", [0, 1, 2, 3], 8, 1, 2, weight=1)
    for order in ((actor, critic), (critic, actor)):
        problem = Problem(4, order)
        schedule = fuse(problem, iterations=30, split_weight=split)
        schedule.validate()
        ends = completion_times(schedule)
        assert max(end for task, end in ends.items() if task.pipeline == "critic") <= 20.0
    with pytest.raises(ValueError, match="deadline"):
        fuse(Problem(4, (actor, replace(critic, deadline=10.0))), iterations=5)
