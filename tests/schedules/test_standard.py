"""Standard schedules against their papers' formulas; serial times; the channel rule."""

import pytest

from rlhfuse.schedules.checks import completion_times, peak_memory
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule, Task, rows_from_text
from rlhfuse.schedules.standard import gpipe, one_f_one_b, serial, serial_makespan, zb_h1
from rlhfuse.schedules.timing import check_channels, makespan

SHAPES = [(2, 2), (4, 4), (4, 9), (8, 16)]


def _one(p: int, m: int) -> Problem:
    return Problem(p, (Pipeline.make("model", range(p), m, 1, 2, weight=1),))


@pytest.mark.parametrize(("p", "m"), SHAPES)
def test_1f1b_and_gpipe_formulas(p: int, m: int) -> None:
    """Bubble (p-1)(F+B) for both; activations p - s and m."""
    eager, plain = one_f_one_b(_one(p, m)), gpipe(_one(p, m))
    for schedule in (eager, plain):
        schedule.validate()
        assert makespan(schedule) == (m + p - 1) * 3
    check_channels(eager)
    assert peak_memory(eager) == tuple(min(m, p - s) for s in range(p))
    assert max(peak_memory(plain)) == m


@pytest.mark.parametrize(("p", "m"), SHAPES)
def test_zb_h1_formula(p: int, m: int) -> None:
    """Bubble (p-1)(F+I-W), a third of 1F1B's; memory as 1F1B's first stage."""
    schedule = zb_h1(_one(p, m))
    schedule.validate()
    check_channels(schedule)
    assert makespan(schedule) == 3 * m + p - 1
    assert max(peak_memory(schedule)) == min(m, p)


def test_serial_makespan_of_flexfusion_problem_0() -> None:
    actor = Pipeline.make("actor", range(8), 32, 5, 10, activation=1.95)
    critics = [
        Pipeline.make(f"critic{i}", range(4 * i + 3, 4 * i - 1, -1), 16, 4, 8, activation=2)
        for i in range(2)
    ]
    problem = Problem(8, (actor, *critics))
    assert serial_makespan(problem) == 585 + 228
    assert makespan(serial(problem)) <= 813


def test_a_cap_below_1f1b_holds_fewer_in_flight() -> None:
    problem = Problem(4, (Pipeline.make("model", range(4), 6, 1, 2),), memory_cap=2.0)
    schedule = serial(problem)
    schedule.validate()
    check_channels(schedule)
    assert max(peak_memory(schedule)) == 2.0


def test_both_sending_first_is_a_deadlock() -> None:
    """Each rank makes four messages before it reads one: more than two may not be unread."""
    problem = Problem(2, (Pipeline.make("a", [0, 1], 4, 1, 0), Pipeline.make("b", [1, 0], 4, 1, 0)))
    rows = rows_from_text(
        "a:0F0 a:0F1 a:0F2 a:0F3 b:1F0 b:1F1 b:1F2 b:1F3\n"
        "b:0F0 b:0F1 b:0F2 b:0F3 a:1F0 a:1F1 a:1F2 a:1F3"
    )
    schedule = Schedule(problem, rows)
    schedule.validate()
    with pytest.raises(ValueError, match="deadlock"):
        check_channels(schedule)
    check_channels(schedule, ahead=2)


def test_a_circle_is_found() -> None:
    problem = Problem(1, (Pipeline.make("a", [0], 1, 1, 2),))
    swapped = Schedule(problem, ((Task.parse("a:0B0"), Task.parse("a:0F0")),))
    with pytest.raises(ValueError, match="before its forward"):
        swapped.validate()
    with pytest.raises(ValueError, match="circle"):
        completion_times(swapped)
