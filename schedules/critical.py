"""Why a schedule takes as long as it does: its critical path, and its idle time by cause."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from itertools import accumulate

from rlhfuse.schedules.checks import completion_times, memory_levels
from rlhfuse.schedules.ir import REL_TOL, Op, Problem, Schedule, Task


class Reason(StrEnum):
    """What a task on the critical path started right after."""

    START = "start"  # time zero
    RELEASE = "release"  # of its pipeline
    RANK = "rank"  # the task before it on its rank
    INPUT = "input"  # the task whose output it needs, on the same rank or without link latency
    LINK = "link"  # the same, after the link's latency


@dataclass(frozen=True, slots=True)
class Step:
    """One task of a critical path. `wait`: link latency or release time just before it."""

    task: Task
    rank: int
    start: float
    end: float
    reason: Reason
    wait: float


class Bubble(StrEnum):
    """Causes of idle time. Exclusive: together they are all the time that a rank does not work."""

    WARM_UP = "warm_up"  # before the rank's first task
    COOL_DOWN = "cool_down"  # after its last
    DEPENDENCY = "dependency"  # the input of its next task is not made (or released) yet
    LINK = "link"  # that input is under way
    MEMORY = "memory"  # a forward could have run, but the cap does not hold one more micro-batch


@dataclass(frozen=True, slots=True)
class Idle:
    """A time in which a rank does nothing, and why."""

    rank: int
    start: float
    end: float
    cause: Bubble


@dataclass(frozen=True, slots=True)
class RankTime:
    """How one rank spends the makespan; `bubbles` has every cause, in the problem's time unit."""

    rank: int
    busy: float
    bubbles: dict[Bubble, float]

    @property
    def idle(self) -> float:
        return sum(self.bubbles.values())


class _Clock:
    """Start and end of every task, and when its input is there."""

    def __init__(self, schedule: Schedule) -> None:
        self.problem: Problem = schedule.problem
        self.pipes = {pipe.name: pipe for pipe in schedule.problem.pipelines}
        self.end = completion_times(schedule)
        self.last = max(self.end.values(), default=0.0)
        self.split = {task for task in self.end if task.op is Op.I}

    def duration(self, task: Task) -> float:
        return self.pipes[task.pipeline].duration(task.op, task.pp_stage, task.microbatch)

    def held(self, row: tuple[Task, ...]) -> list[float]:
        """Memory after each task of a row."""
        changes = (
            sum(self.pipes[t.pipeline].memory_change(t.op, t.pp_stage, t.microbatch)) for t in row
        )
        return list(accumulate(changes))

    def start(self, task: Task) -> float:
        return self.end[task] - self.duration(task)

    def source(self, task: Task) -> Task | None:
        """The task whose output `task` needs; None for a first forward."""
        pipe, name = self.pipes[task.pipeline], task.pipeline
        stage, mb = task.pp_stage, task.microbatch
        if task.op is Op.W:
            return Task(name, Op.I, stage, mb)
        if task.op is Op.F:
            return None if stage == 0 else Task(name, Op.F, stage - 1, mb)
        if stage == pipe.num_stages - 1:
            return Task(name, Op.F, stage, mb)
        split = Task(name, Op.I, stage + 1, mb)
        return split if split in self.split else Task(name, Op.B, stage + 1, mb)

    def latency(self, task: Task) -> float:
        """Of the link that the input of `task` comes over."""
        source, pipe = self.source(task), self.pipes[task.pipeline]
        if source is None:
            return 0.0
        return self.problem.latency(pipe.stages[source.pp_stage], pipe.stages[task.pp_stage])

    def arrival(self, task: Task) -> float:
        """When the input of `task` is on its rank."""
        source = self.source(task)
        if source is None:
            return self.pipes[task.pipeline].release
        return self.end[source] + self.latency(task)


@dataclass(frozen=True, slots=True)
class _Memory:
    """Of one row: `levels` while or just after each task, `held` after it."""

    cap: float | None
    levels: list[float]
    held: list[float]
    places: tuple[list[int], ...]  # of each pipeline, stage and operation, in order

    def fits(self, claim: float, index: int, position: int, *, stays: bool) -> bool:
        """Whether `claim` more would fit before place `index`; till `position` where it stays."""
        assert self.cap is not None
        top = self.held[index - 1]
        if stays:
            top = max(top, *self.levels[index:position])
        return claim + top <= self.cap * (1 + REL_TOL)


def critical_path(schedule: Schedule) -> tuple[Step, ...]:
    """A chain of tasks, each starting when what it waited for was over, as long as the makespan.

    Durations and waits of its steps add up to the makespan: only a shorter task, link or release on
    every such chain, or another order, ends the schedule earlier.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    clock = _Clock(schedule)
    before: dict[Task, Task | None] = {}
    home: dict[Task, int] = {}
    for rank, index, task in schedule.tasks():
        before[task] = schedule.rows[rank][index - 1] if index else None
        home[task] = rank
    steps: list[Step] = []
    at: Task | None = max(clock.end, key=lambda task: clock.end[task], default=None)
    while at is not None:
        step, following = _step_back(clock, at, home[at], before[at])
        steps.append(step)
        at = following
    return tuple(reversed(steps))


def _step_back(
    clock: _Clock, task: Task, rank: int, earlier: Task | None
) -> tuple[Step, Task | None]:
    """The step of `task`, and the task that it waited for."""
    start, source = clock.start(task), clock.source(task)
    slack = REL_TOL * max(clock.last, 1e-300)
    if source is not None and clock.arrival(task) >= start - slack:
        link = clock.latency(task)
        reason, wait, following = (Reason.LINK if link else Reason.INPUT), link, source
    elif earlier is not None and clock.end[earlier] >= start - slack:
        reason, wait, following = Reason.RANK, 0.0, earlier
    else:
        reason, wait, following = (Reason.RELEASE if start > 0 else Reason.START), start, None
    return Step(task, rank, start, clock.end[task], reason, wait), following


def idle_spans(schedule: Schedule) -> tuple[Idle, ...]:
    """All idle time of all ranks, by rank and time, each piece with its cause.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    return tuple(_idle_spans(schedule, _Clock(schedule)))


def rank_times(schedule: Schedule) -> tuple[RankTime, ...]:
    """Per rank, busy time and idle time by cause: together the makespan.

    Raises:
        ValueError: tasks wait for each other in a circle.
    """
    clock = _Clock(schedule)
    times = tuple(
        RankTime(rank, sum(clock.duration(task) for task in row), dict.fromkeys(Bubble, 0.0))
        for rank, row in enumerate(schedule.rows)
    )
    for idle in _idle_spans(schedule, clock):
        times[idle.rank].bubbles[idle.cause] += idle.end - idle.start
    return times


def total_bubbles(times: tuple[RankTime, ...]) -> dict[str, float]:
    """Idle time by cause, summed over ranks."""
    return {cause.value: sum(time.bubbles[cause] for time in times) for cause in Bubble}


def _idle_spans(schedule: Schedule, clock: _Clock) -> Iterator[Idle]:
    levels = tuple(memory_levels(schedule))
    for rank, row in enumerate(schedule.rows):
        if not row:
            yield Idle(rank, 0.0, clock.last, Bubble.WARM_UP)
            continue
        pieces = [(0.0, clock.start(row[0]), Bubble.WARM_UP)]
        memory = _Memory(
            clock.problem.memory_cap, levels[rank], clock.held(row), _places_of_each_kind(row)
        )
        for index in range(1, len(row)):
            pieces += _pause(clock, row, index, memory)
        pieces.append((clock.end[row[-1]], clock.last, Bubble.COOL_DOWN))
        yield from (Idle(rank, *piece) for piece in pieces if piece[1] > piece[0])


def _pause(
    clock: _Clock, row: tuple[Task, ...], index: int, memory: _Memory
) -> list[tuple[float, float, Bubble]]:
    """The time between two tasks of a row, cut by cause; empty pieces may be among them."""
    begin, end = clock.end[row[index - 1]], clock.start(row[index])
    if end - begin <= REL_TOL * clock.last:
        return [(begin, end, Bubble.DEPENDENCY)]  # rounding
    stall = min(end, max(begin, _stalled_from(clock, row, index, memory, end)))
    link = min(stall, max(begin, end - clock.latency(row[index])))
    return [
        (begin, link, Bubble.DEPENDENCY),
        (link, stall, Bubble.LINK),
        (stall, end, Bubble.MEMORY),
    ]


def _stalled_from(
    clock: _Clock, row: tuple[Task, ...], index: int, memory: _Memory, end: float
) -> float:
    """From when a forward could have run before ``row[index]``, were it not for the cap.

    Infinite where there is none, and where something else could have run within the cap: then the
    order waits, not memory.
    """
    first = float("inf")
    if memory.cap is None:
        return first
    for places in memory.places:
        which = bisect_left(places, index)
        if which == len(places):
            continue
        position = places[which]
        task, arrival = row[position], clock.arrival(row[position])
        if arrival >= end or position == index:
            continue
        pipe = clock.pipes[task.pipeline]
        claim, _ = pipe.memory_change(task.op, task.pp_stage, task.microbatch)
        if memory.fits(claim, index, position, stays=not pipe.forward_only):
            return float("inf")
        first = min(first, arrival)
    return first


def _places_of_each_kind(row: tuple[Task, ...]) -> tuple[list[int], ...]:
    kinds: dict[tuple[str, Op, int], list[int]] = {}
    for position, task in enumerate(row):
        kinds.setdefault((task.pipeline, task.op, task.pp_stage), []).append(position)
    return tuple(kinds.values())
