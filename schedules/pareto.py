"""Latency against peak memory: the schedules of which none is better in both."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from rlhfuse.schedules.bounds import memory_bound
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.fused import DEFAULT_ROUNDS, fuse
from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.standard import one_f_one_b, serial
from rlhfuse.schedules.timing import makespan

BISECTIONS = 12  # of the interval in which the least feasible cap lies


@dataclass(frozen=True, slots=True)
class Point:
    """One schedule of the front; in the problem's units."""

    peak_memory: float
    makespan: float
    schedule: Schedule


def pareto(
    problem: Problem,
    *,
    points: int = 8,
    budget_s: float | None = None,
    iterations: int | None = None,
    seed: int = 0,
    split_weight: bool = False,
    workers: int = 1,
    on_point: Callable[[Point], None] | None = None,
) -> tuple[Point, ...]:
    """The front that searches at `points` memory caps find, from least memory to least time.

    Caps go evenly from the least feasible one to what the fastest schedule needs (or the problem's
    own cap, if that is lower). Each search starts from the schedule before, so a looser cap is
    never slower. The budget is divided among all searches, which take `workers` cores each;
    `on_point` sees each answer as it comes.

    Raises:
        ValueError: fewer than two points, or a problem that `fuse` cannot answer.
    """
    if points < 2:
        raise ValueError(f"points is {points}, expected at least 2")
    if iterations is None and budget_s is None:
        iterations = DEFAULT_ROUNDS
    share_s = None if budget_s is None else budget_s / (points + 1)
    rounds = None if iterations is None else max(1, iterations // (points + 1))

    def search(at: Problem, start: Schedule | None) -> Point:
        found = fuse(
            at,
            budget_s=share_s,
            iterations=rounds,
            seed=seed,
            split_weight=split_weight,
            warm_start=start,
            workers=workers,
        )
        plain = Schedule(problem, found.rows)
        return Point(max(peak_memory(plain)), makespan(plain), plain)

    fastest = search(problem, None)
    least = _least_cap(problem)
    found: list[Point] = []
    for number in range(points - 1):
        cap = least + (fastest.peak_memory - least) * number / (points - 1)
        if cap <= 0 or cap >= fastest.peak_memory:
            continue
        start = found[-1].schedule if found else None
        found.append(search(replace(problem, memory_cap=cap * (1 + REL_TOL)), start))
        if on_point is not None:
            on_point(found[-1])
    best = min([*found, fastest], key=lambda point: point.makespan)
    fastest = search(problem, best.schedule)
    if on_point is not None:
        on_point(fastest)
    return _front([*found, fastest])


def _front(points: list[Point]) -> tuple[Point, ...]:
    """Those that no other beats in both, by memory."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.peak_memory, p.makespan)):
        if not front or point.makespan < front[-1].makespan * (1 - REL_TOL):
            front.append(point)
    return tuple(front)


def _least_cap(problem: Problem) -> float:
    """About the least cap under which `serial` exists; at least the bound of any schedule."""
    low = memory_bound(problem, float("inf"))
    high = max(peak_memory(one_f_one_b(replace(problem, memory_cap=None))))
    if _feasible(problem, low):
        return low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _feasible(problem, middle) else (middle, high)
    return high


def _feasible(problem: Problem, cap: float) -> bool:
    if cap <= 0:
        return False
    try:
        serial(replace(problem, memory_cap=cap)).validate()
    except ValueError:
        return False
    return True
