"""Critical paths and causes of idle time: sums that must come out, and textbook cases."""

from itertools import pairwise

import pytest
from hypothesis import given, settings

from rlhfuse.schedules.critical import Bubble, Reason, critical_path, rank_times, total_bubbles
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b, serial
from rlhfuse.schedules.timing import makespan
from tests.schedules.problems import problems


@given(problems())
@settings(max_examples=60, deadline=None)
def test_causes_and_work_add_up_to_the_makespan(problem: Problem) -> None:
    for schedule in (serial(problem), fuse(problem, iterations=1, split_weight=True)):
        length = makespan(schedule)
        for time in rank_times(schedule):
            assert set(time.bubbles) == set(Bubble)
            assert min(time.bubbles.values()) >= -1e-9
            assert time.busy + time.idle == pytest.approx(length)


@given(problems())
@settings(max_examples=60, deadline=None)
def test_critical_path_is_a_chain_as_long_as_the_makespan(problem: Problem) -> None:
    schedule = fuse(problem, iterations=1, split_weight=True)
    steps = critical_path(schedule)
    assert steps[-1].end == pytest.approx(makespan(schedule))
    assert steps[0].reason in (Reason.START, Reason.RELEASE)
    whole = sum(step.end - step.start + step.wait for step in steps)
    assert whole == pytest.approx(makespan(schedule))
    place = {task: (rank, index) for rank, index, task in schedule.tasks()}
    for before, step in pairwise(steps):
        assert step.start == pytest.approx(before.end + step.wait)
        if step.reason is Reason.RANK:
            rank, index = place[step.task]
            assert place[before.task] == (rank, index - 1)
        else:
            assert before.task.pipeline == step.task.pipeline
            assert before.task.microbatch == step.task.microbatch


def test_bubbles_of_1f1b() -> None:
    """Rank r waits r forwards at first and r backwards at last; in between for the round trip."""
    p, m = 4, 8
    schedule = one_f_one_b(Problem(p, (Pipeline.make("a", range(p), m, 1, 2),)))
    for rank, time in enumerate(rank_times(schedule)):
        assert time.bubbles[Bubble.WARM_UP] == rank
        assert time.bubbles[Bubble.COOL_DOWN] == 2 * rank
        assert time.bubbles[Bubble.DEPENDENCY] == 3 * (p - 1 - rank)
        assert time.busy == 3 * m
    totals = total_bubbles(rank_times(schedule))
    assert sum(totals.values()) == p * 3 * (p - 1)


def test_links_are_told_from_dependencies() -> None:
    pipes = (Pipeline.make("a", [0, 1], 1, 1, 2),)
    schedule = one_f_one_b(Problem(2, pipes, link_latency=0.5))
    first, second = rank_times(schedule)
    assert first.bubbles[Bubble.LINK] == 0.5  # its gradient is under way
    assert first.bubbles[Bubble.DEPENDENCY] == 3.5
    assert second.bubbles == dict.fromkeys(Bubble, 0.0) | {
        Bubble.WARM_UP: 1.5,
        Bubble.COOL_DOWN: 2.5,
    }
    assert [step.reason for step in critical_path(schedule)] == [
        Reason.START,
        Reason.LINK,
        Reason.INPUT,
        Reason.LINK,
    ]


def test_a_cap_stalls() -> None:
    """With room for one micro-batch, the second forward waits for the first backward."""
    pipes = (Pipeline.make("a", [0, 1], 3, 1, 2),)
    tight = rank_times(serial(Problem(2, pipes, memory_cap=1.0)))
    # F and B of the other stage, three times; the last time no forward is left that could run.
    assert tight[0].bubbles[Bubble.MEMORY] == 6
    assert tight[0].bubbles[Bubble.DEPENDENCY] == 3
    loose = rank_times(serial(Problem(2, pipes)))
    assert sum(time.bubbles[Bubble.MEMORY] for time in loose) == 0
