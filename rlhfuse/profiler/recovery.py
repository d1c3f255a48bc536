"""Which schedule ran: stages, micro-batches, order and measured costs, from a timeline's tasks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from rlhfuse.profiler.attribution import device_lanes
from rlhfuse.profiler.rounds import (
    TRAINING_KINDS,
    Round,
    find_rounds,
    parse_task,
    remote_inputs,
)
from rlhfuse.profiler.table import SpanTable
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.timeline import Kind, Timeline

_STRAGGLES = 1.15  # this much slower than the median counts as straggling


@dataclass(frozen=True)
class Recovered:
    """One training round: what ran, in what order, for how long (seconds)."""

    schedule: Schedule
    durations: Mapping[Task, float]
    gap_s: float  # between a task and the next one of its rank, inputs being there: median
    lag_s: float  # between a result and its use on another rank: median
    start_s: float
    makespan_s: float

    @property
    def problem(self) -> Problem:
        return self.schedule.problem


def recover(timeline: Timeline | SpanTable) -> tuple[list[Recovered], list[str]]:
    """Every training round of a timeline whose tasks are named, and why others are left out."""
    recovered, warnings = [], []
    table = SpanTable.of(timeline)
    ranks = {lane: rank for rank, lane in enumerate(device_lanes(table))}
    spans = table.spans(table.is_kind((*TRAINING_KINDS, Kind.OPTIMIZER)))
    for number, training in enumerate(find_rounds(spans)):
        try:
            recovered.append(_recover(training, ranks))
        except ValueError as error:
            why = str(error).splitlines()[0]
            warnings.append(f"training round {number}: schedule not recovered: {why}")
    return recovered, warnings


def stragglers(rounds: Sequence[Recovered]) -> list[str]:
    """Stages and micro-batches that took clearly longer than their peers, in words."""
    told: list[str] = []
    if not rounds:
        return told
    last = rounds[-1]
    for pipe in last.problem.pipelines:
        per_stage = [pipe.forward[s] + pipe.backward[s] for s in range(pipe.num_stages)]
        middle = median(per_stage)
        for stage, seconds in enumerate(per_stage):
            if seconds > _STRAGGLES * middle:
                told.append(
                    f"{pipe.name} stage {stage}: {seconds / middle:.2f} times the median stage"
                )
        for mb, weight in enumerate(microbatch_costs(last, pipe)):
            if weight > _STRAGGLES:
                told.append(f"{pipe.name} micro-batch {mb}: {weight:.2f} times the median one")
    return told


def schedule_name(schedule: Schedule) -> str:
    """How its rows look: ``fused``, ``serial``, ``1F1B``, ``GPipe``, or ``custom``."""
    pipes = schedule.problem.pipelines
    if len(pipes) > 1 and _replicas(pipes):
        kinds = {schedule_name(_alone(schedule, pipe)) for pipe in pipes}
        return f"{' and '.join(sorted(kinds))}, {len(pipes)} data-parallel replicas"
    if len(pipes) > 1:
        mixed = any(_switches(row) > len(pipes) - 1 for row in schedule.rows)
        return "fused" if mixed else "serial"
    split = any(task.op is Op.W for row in schedule.rows for task in row)
    if split:
        return "zero-bubble (weight gradient split off)"
    if all(_is_gpipe(row) for row in schedule.rows):
        return "GPipe"
    (pipe,) = pipes
    if pipe.interleaved:
        return f"interleaved ({pipe.num_stages // len(set(pipe.stages))} chunks a rank)"
    return "1F1B" if _is_one_f_one_b(schedule, pipe) else "custom"


def _replicas(pipes: Sequence[Pipeline]) -> bool:
    """Whether the pipelines run side by side: as many stages each, and no rank of two."""
    ranks = [set(pipe.stages) for pipe in pipes]
    apart = sum(map(len, ranks)) == len(set[int]().union(*ranks))
    return apart and len({pipe.num_stages for pipe in pipes}) == 1


def _alone(schedule: Schedule, pipe: Pipeline) -> Schedule:
    """One pipeline of a schedule, with the others' tasks left out."""
    rows = tuple(tuple(t for t in row if t.pipeline == pipe.name) for row in schedule.rows)
    return Schedule(replace(schedule.problem, pipelines=(pipe,)), rows)


def _recover(training: Round, ranks: Mapping[str, int]) -> Recovered:
    rows: dict[int, list[Task]] = {}
    durations: dict[Task, float] = {}
    starts: dict[Task, float] = {}
    for lane, spans in training.spans.items():
        if lane not in ranks:
            raise ValueError(f"lane {lane!r} is no device")
        rank = ranks[lane]
        for span in spans:
            task = parse_task(span.name)
            if task is None:
                raise ValueError(f"span {span.name!r} is not named like a task")
            if task in durations:
                raise ValueError(f"task {task} ran twice")
            durations[task], starts[task] = span.duration_s, span.start_s
            rows.setdefault(rank, []).append(task)
    problem = _problem(rows, durations)
    schedule = Schedule(problem, tuple(tuple(rows.get(r, ())) for r in range(problem.num_ranks)))
    schedule.validate()
    gaps, lags = _delays(schedule, starts, durations)
    return Recovered(
        schedule,
        durations,
        gap_s=_typical(gaps),
        lag_s=_typical(lags),
        start_s=training.start_s,
        makespan_s=training.end_s - training.start_s,
    )


def _problem(rows: Mapping[int, Sequence[Task]], durations: Mapping[Task, float]) -> Problem:
    names = dict.fromkeys(task.pipeline for row in rows.values() for task in row)
    pipes = tuple(_pipeline(name, rows, durations) for name in names)
    return Problem(max(rows) + 1, pipes)


def _pipeline(
    name: str, rows: Mapping[int, Sequence[Task]], durations: Mapping[Task, float]
) -> Pipeline:
    places: dict[int, int] = {}
    for rank, row in rows.items():
        for task in row:
            if task.pipeline == name and places.setdefault(task.pp_stage, rank) != rank:
                raise ValueError(f"{name}: stage {task.pp_stage} ran on two ranks")
    stages = range(len(places))
    if sorted(places) != list(stages):
        raise ValueError(
            f"{name}: stages {sorted(set(range(max(places))) - set(places))} are missing"
        )
    mine = [task for task in durations if task.pipeline == name]
    cost: dict[tuple[Op, int], float] = {}
    for op in Op:
        for stage in stages:
            found = [durations[t] for t in mine if t.op is op and t.pp_stage == stage]
            cost[op, stage] = median(found) if found else 0.0
    return Pipeline.make(
        name,
        [places[stage] for stage in stages],
        1 + max(task.microbatch for task in mine),
        [cost[Op.F, s] for s in stages],
        [cost[Op.B, s] or cost[Op.I, s] + cost[Op.W, s] for s in stages],
        weight=[cost[Op.W, s] for s in stages],
        interleaved=len(set(places.values())) < len(places),
    )


def _delays(
    schedule: Schedule, starts: Mapping[Task, float], durations: Mapping[Task, float]
) -> tuple[list[float], list[float]]:
    """Delays (s) of tasks after their rank was free, and after their remote input was there."""
    gaps: list[float] = []
    lags: list[float] = []
    for row in schedule.rows:
        free = float("-inf")
        for task in row:
            inputs = [x for x in remote_inputs(task) if x in starts]
            ready = max((starts[x] + durations[x] for x in inputs), default=float("-inf"))
            if max(free, ready) > float("-inf"):
                (lags if ready > free else gaps).append(starts[task] - max(free, ready))
            free = starts[task] + durations[task]
    return gaps, lags


def _typical(values: Sequence[float]) -> float:
    return max(0.0, median(values)) if values else 0.0


def microbatch_costs(training: Recovered, pipe: Pipeline) -> list[float]:
    """Time of each micro-batch over all stages, as a multiple of the median one."""
    totals = [0.0] * pipe.num_microbatches
    for task, seconds in training.durations.items():
        if task.pipeline == pipe.name:
            totals[task.microbatch] += seconds
    middle = median(totals)
    return [total / middle if middle > 0 else 1.0 for total in totals]


def _switches(row: Sequence[Task]) -> int:
    return sum(a.pipeline != b.pipeline for a, b in pairwise(row))


def _is_gpipe(row: Sequence[Task]) -> bool:
    ops = [task.op for task in row]
    return ops == sorted(ops, key=lambda op: op is not Op.F)


def _is_one_f_one_b(schedule: Schedule, pipe: Pipeline) -> bool:
    for stage, rank in enumerate(pipe.stages):
        ahead = min(pipe.num_microbatches, pipe.num_stages - stage)
        ops = "".join(task.op.value for task in schedule.rows[rank])
        steady = pipe.num_microbatches - ahead
        if ops != "F" * ahead + "BF" * steady + "B" * ahead:
            return False
    return True
