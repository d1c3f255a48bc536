"""Timelines whose causes and clocks are known, because they are made here, moment by moment."""

import random
from dataclasses import dataclass, field

from rlhfuse.profiler.causes import Cause
from rlhfuse.profiler.rounds import remote_inputs
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Task
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.timeline import ArgValue, Kind, Span, Timeline

FORWARD_S, BACKWARD_S, LATENCY_S, SYNC_S = 0.010, 0.020, 0.0005, 0.015
GATHER_S = 0.005


@dataclass(slots=True)
class Truth:
    """What really happened: spans on true clocks, and each lane's seconds by cause."""

    spans: list[Span] = field(default_factory=list)
    causes: dict[str, dict[Cause, float]] = field(default_factory=dict)

    def add(self, lane: str, cause: Cause, seconds: float) -> None:
        mine = self.causes.setdefault(lane, {})
        if seconds > 0:
            mine[cause] = mine.get(cause, 0.0) + seconds

    @property
    def wall_s(self) -> float:
        return max(span.end_s for span in self.spans)


def make(
    ranks: int, replicas: int, microbatches: int, rng: random.Random, *, gathers: bool = False
) -> Truth:
    """One 1F1B step of `replicas` pipelines of `ranks` stages, then an all-reduce per stage;
    `gathers`: before it, replicas gather their parameters, as with sharded optimizer states.

    Tasks jitter by 10 %, messages by 20 %, one task in twenty starts 2 ms late for no reason but
    its host; one replica is 8 % slower than the others.
    """
    truth = Truth()
    ends: dict[int, float] = {}
    for replica in range(replicas):
        slow = 1.08 if replica == 1 else 1.0
        pipe = Pipeline.make(f"m{replica}", list(range(ranks)), microbatches, 1.0, 2.0)
        rows = one_f_one_b(Problem(ranks, (pipe,))).rows
        done = _run(truth, rows, replica * ranks, slow, rng, GATHER_S if gathers else 0.0)
        ends.update(done)
    _finish(truth, ranks, replicas, ends)
    return truth


def _run(
    truth: Truth,
    rows: tuple[tuple[Task, ...], ...],
    first_rank: int,
    slow: float,
    rng: random.Random,
    gather_s: float,
) -> dict[int, float]:
    """Run the rows; when each rank was done."""
    ended: dict[Task, float] = {}
    at = [0] * len(rows)
    free = [gather_s] * len(rows)
    for r in range(len(rows) if gather_s else 0):
        lane = f"rank{first_rank + r}"
        args: dict[str, ArgValue] = {"what": "dp_sync", "collective": f"parameters {r}"}
        truth.spans.append(Span(lane, 0.0, gather_s, Kind.TRANSFER, "all-gather", args))
        truth.add(lane, Cause.DP_SYNC, gather_s)
    while any(at[r] < len(row) for r, row in enumerate(rows)):
        for r, row in enumerate(rows):
            while at[r] < len(row):
                task = row[at[r]]
                inputs = [x for x in remote_inputs(task) if _exists(x, rows)]
                if any(x not in ended for x in inputs):
                    break
                made = max((ended[x] for x in inputs), default=None)
                lane = f"rank{first_rank + r}"
                start = _wait(truth, lane, task, free[r], made, at[r] == 0, rng)
                base = FORWARD_S if task.op is Op.F else BACKWARD_S
                free[r] = start + base * slow * rng.uniform(0.9, 1.1)
                ended[task] = free[r]
                truth.spans.append(Span(lane, start, free[r], Kind(task.op.value), str(task)))
                cause = Cause.FORWARD if task.op is Op.F else Cause.BACKWARD
                truth.add(lane, cause, free[r] - start)
                at[r] += 1
    return {first_rank + r: end for r, end in enumerate(free)}


def _exists(task: Task, rows: tuple[tuple[Task, ...], ...]) -> bool:
    return 0 <= task.pp_stage < len(rows) and task.op is not Op.I


def _wait(
    truth: Truth,
    lane: str,
    task: Task,
    free: float,
    made: float | None,
    first: bool,
    rng: random.Random,
) -> float:
    """When the task starts; what came before it is written down with its cause."""
    arrives = made + LATENCY_S * rng.uniform(0.8, 1.2) if made is not None else 0.0
    if arrives > free:
        waits = Cause.UPSTREAM if task.op is Op.F else Cause.DOWNSTREAM
        sent = max(free, made if made is not None else free)
        truth.add(lane, Cause.WARM_UP if first else waits, sent - free)
        truth.add(lane, Cause.TRANSFER, arrives - sent)
        args: dict[str, ArgValue] = {"what": "receive"}
        truth.spans.append(Span(lane, free, arrives, Kind.WAIT, str(task), args))
        return arrives
    late = 0.002 if rng.random() < 0.05 and not first else 0.0
    truth.add(lane, Cause.HOST_GAP, late)
    return free + late


def _finish(truth: Truth, ranks: int, replicas: int, ends: dict[int, float]) -> None:
    """The all-reduce of each stage's replicas, and what is left until the last one's end."""
    synced: dict[int, float] = dict(ends)
    for stage in range(ranks if replicas > 1 else 0):
        mine = [replica * ranks + stage for replica in range(replicas)]
        last = max(ends[rank] for rank in mine)
        for rank in mine:
            lane = f"rank{rank}"
            args: dict[str, ArgValue] = {"what": "dp_sync", "collective": f"stage {stage}"}
            span = Span(lane, ends[rank], last + SYNC_S, Kind.TRANSFER, "all-reduce", args)
            truth.spans.append(span)
            truth.add(lane, Cause.STRAGGLER, last - ends[rank])
            truth.add(lane, Cause.DP_SYNC, SYNC_S)
            synced[rank] = last + SYNC_S
    trained, wall = max(ends.values()), max(synced.values())
    for rank, end in synced.items():
        truth.add(f"rank{rank}", Cause.COOL_DOWN, max(0.0, trained - end))
        truth.add(f"rank{rank}", Cause.CONTROLLER, wall - max(end, trained))


def disturbed(truth: Truth, rng: random.Random) -> tuple[Timeline, dict[str, tuple[float, float]]]:
    """The spans on clocks that are off by up to 200 ms and drift by up to 50 us a second; and what
    each clock shows: its offset and its rate."""
    lanes = sorted({span.lane for span in truth.spans}, key=lambda lane: int(lane[4:]))
    clocks = {lane: (rng.uniform(-0.2, 0.2), rng.uniform(-5e-5, 5e-5)) for lane in lanes}
    spans = []
    for span in truth.spans:
        offset, rate = clocks[span.lane]
        start, end = (t + offset + rate * t for t in (span.start_s, span.end_s))
        spans.append(Span(span.lane, start, end, span.kind, span.name, span.args))
    return Timeline(tuple(spans)), clocks
