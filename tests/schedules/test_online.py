"""Laws of schedules during a run."""

from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.online import OnlineScheduler
from rlhfuse.schedules.standard import serial
from rlhfuse.schedules.timing import check_channels, makespan


def _problem(scale: float, microbatches: int = 6) -> Problem:
    actor = Pipeline.make("actor", range(4), microbatches, 5 * scale, 10, weight=5)
    critic = Pipeline.make("critic", range(4)[::-1], microbatches, 2, 4 * scale, weight=2)
    return Problem(4, (actor, critic), memory_cap=6.0)


def test_answers_are_legal_and_never_worse_than_serial() -> None:
    with OnlineScheduler(budget_s=0.02, split_weight=True) as scheduler:
        for step in range(6):
            problem = _problem(1 + 0.1 * step, 4 + step % 3)
            found = scheduler.schedule(problem)
            assert found.problem == problem
            found.validate()
            check_channels(found)
            assert makespan(found) <= makespan(serial(problem)) * (1 + 1e-9)


def test_the_improver_makes_the_next_answer_no_worse_and_the_same_problem_is_remembered() -> None:
    problem = _problem(1.0, 8)
    with OnlineScheduler(budget_s=0.0) as scheduler:
        first = scheduler.schedule(problem)
        assert scheduler.schedule(problem) is first
        scheduler.improve(problem, budget_s=0.5)
        scheduler.wait()
        better = scheduler.schedule(problem)
        assert makespan(better) < makespan(first)
        # A little slower, in the same shape: the old order is where the search starts.
        near = _problem(1.01, 8)
        old_order = makespan(fuse(near, iterations=0, warm_start=better))
        assert makespan(scheduler.schedule(near)) <= old_order * (1 + 1e-9)


def test_all_problems_of_a_step_are_improved_in_turn_and_once() -> None:
    step = [_problem(1.0, 8), _problem(1.0, 9)]
    with OnlineScheduler(budget_s=0.0, split_weight=True) as scheduler:
        first = [makespan(scheduler.schedule(problem)) for problem in step]
        scheduler.improve_asked(budget_s=0.5)
        scheduler.wait()
        second = [makespan(scheduler.schedule(problem)) for problem in step]
        assert all(after < before for before, after in zip(first, second, strict=True))
        scheduler.improve_asked(budget_s=0.0)
        scheduler.improve_asked(budget_s=60.0)
        scheduler.wait()  # nothing was asked since: it ends at once


def test_stopping_the_improver_keeps_what_it_found() -> None:
    problem = _problem(1.0, 12)
    with OnlineScheduler(budget_s=0.0) as scheduler:
        before = scheduler.schedule(problem)
        scheduler.improve(problem, budget_s=60.0)
        scheduler.stop()
        after = scheduler.schedule(problem)
    assert makespan(after) <= makespan(before)
    assert max(peak_memory(after)) <= 6.0 * (1 + 1e-6)
