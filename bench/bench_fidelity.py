"""How much longer does a schedule take than planned, and what does the executor cost a task?

    python -m bench.bench_fidelity --ranks 8 16 --forward-ms 10 5

Tasks sleep (forward once, backward twice the given time), so that cores do not matter: what is
left is messages and bookkeeping. A machine oversleeps; as the sleep stands for computing, which
ends when it is done, the timer's slack (50 us on Linux) is set to 0, and a task asks for less by
what the tasks before it overslept on average (`--plain-sleep`: it does not). `task_over_planned`
says how long tasks were after all. `measured` is from the first task's start to the last one's end,
`with_setup` from the call to its return on all ranks, `cpu_us_per_task` the processor time of all
that is not sleep.

`replayed` is what an ideal executor, with free messages, would take for tasks that sleep as long as
they did: `over_replayed` is what ours loses. `lost_...`: of `planned`, what the critical path of a
run took beyond what was asked: in tasks (that woke up late, more than later ones made up for),
between two tasks of a rank, and for messages that a rank waited for. `message_us` is the median
time from a task's end to the start of one that waited for its message, and `over_latency` compares
with a plan that knows it. `over_learnt` compares later repetitions with the plan that a run makes
once it has measured: with the first one's mean task times and that latency.
`carrier`: what messages travel by, in processes of their own: between processes of one machine
(`local`, as a run on CPUs does) or process groups (`gloo`); with gloo also `bare`, the same
messages between the same sleeping ranks without the executor (`bench.bare_gloo`), in turn.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from bench.bare_gloo import BareGloo
from bench.ideal_executor import TASKS, lost, replay, sources
from bench.ranks import run_ranks, say
from bench.record import Row, print_table, write_result
from bench.sleep import EvenSleep
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule
from rlhfuse.schedules.timing import makespan
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.channels import Channels
from rlhfuse.training.clock import HostClock
from rlhfuse.training.executor import Executor

CPU = torch.device("cpu")
GAIN = 0.1


class Sleeper:
    """A stage whose tasks sleep."""

    def __init__(self, forward_s: float, shape: tuple[int, int], sleep: EvenSleep) -> None:
        self._forward_s = forward_s
        self._message = torch.zeros(shape)
        self._sleep = sleep

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        self._sleep(self._forward_s)
        return self._message

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        self._sleep(2 * self._forward_s)
        return self._message

    def input_gradient(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        self._sleep(self._forward_s)
        return self._message

    def weight_gradient(self, microbatch: int) -> None:
        self._sleep(self._forward_s)


def two_models(num_ranks: int, num_microbatches: int, forward_s: float) -> Problem:
    ranks = range(num_ranks)
    return Problem(
        num_ranks,
        tuple(
            Pipeline.make(
                name, stages, num_microbatches, forward_s, 2 * forward_s, weight=forward_s
            )
            for name, stages in (("actor", ranks), ("critic", ranks[::-1]))
        ),
    )


@dataclass(frozen=True, slots=True)
class Measured:
    """One rank, per repeat: when the call began and returned, the spans, processor seconds; the
    bare run's start and end."""

    calls: list[tuple[float, float]] = field(default_factory=list)
    spans: list[list[Span]] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    bare: list[tuple[float, float]] = field(default_factory=list)


def seconds_of(forward_s: float) -> dict[Op, float]:
    return {Op.F: forward_s, Op.B: 2 * forward_s, Op.I: forward_s, Op.W: forward_s}


@dataclass(frozen=True, slots=True)
class Way:
    """How a schedule is run: how often, message rows of 1 KB, by what, and `EvenSleep`'s gain."""

    repeats: int
    rows: int
    carrier: str
    gain: float


def run_schedule(schedule: Schedule, forward_s: float, way: Way) -> list[Measured]:
    """Runs of a schedule of sleeping tasks, on as many processes as it has ranks."""
    shape = (way.rows, 256)
    pipelines = schedule.problem.pipelines

    def run(rank: int) -> Measured:
        sleep = EvenSleep(way.gain)
        channels = Channels(
            rank,
            {pipe.name: pipe.stages for pipe in pipelines},
            device=CPU,
            dtype=torch.float32,
            timeout=timedelta(seconds=60),
            local=way.carrier == "local",
        )
        runners = {
            (p.name, p.stages.index(rank)): Sleeper(forward_s, shape, sleep) for p in pipelines
        }
        executor = Executor(rank, channels, runners, HostClock(), _get_default_store())
        shapes = {pipe.name: [shape] * pipe.num_microbatches for pipe in pipelines}
        bare = None
        if way.carrier == "gloo":
            bare = BareGloo(schedule, rank, seconds_of(forward_s), shape, sleep)
        found = Measured()
        for _ in range(way.repeats):
            if bare is not None:
                dist.barrier()
                found.bare.append(bare.run(ahead=2))
            dist.barrier()
            spans: list[Span] = []
            start, cpu_s = time.monotonic(), time.process_time()
            executor.run(schedule, shapes, spans)
            found.calls.append((start, time.monotonic()))
            found.cpu_s.append((time.process_time() - cpu_s) / len(schedule.rows[rank]))
            found.spans.append(spans)
        return found

    return run_ranks(schedule.problem.num_ranks, run)


def fidelity(num_ranks: int, forward_s: float, split: bool, way: Way) -> Row:
    """One table row: runs of a fused schedule on `num_ranks` processes."""
    repeats, ops = way.repeats, "F I W" if split else "F B"
    what = f"{num_ranks} ranks, {forward_s * 1e3:g} ms, {ops}, {way.carrier}"
    schedule = fuse(
        two_models(num_ranks, 2 * num_ranks, forward_s), iterations=40, split_weight=split
    )
    planned = makespan(schedule)
    say(f"{what}: running {repeats} times {planned:.2f} s")
    results = run_schedule(schedule, forward_s, way)
    per_repeat = [[s for r in results for s in r.spans[i]] for i in range(repeats)]
    tasks = [[s for s in spans if s.kind in TASKS] for spans in per_repeat]
    ratios = [
        (max(s.end_s for s in part) - min(s.start_s for s in part)) / planned for part in tasks
    ]
    whole = [
        (max(r.calls[i][1] for r in results) - min(r.calls[i][0] for r in results)) / planned
        for i in range(repeats)
    ]
    bare = [
        (max(r.bare[i][1] for r in results) - min(r.bare[i][0] for r in results)) / planned
        for i in range(repeats if results[0].bare else 0)
    ]
    latency_s = statistics.median(x for part in tasks for x in message_times(schedule, part))
    problem = replace(schedule.problem, link_latency=latency_s)
    with_latency = makespan(Schedule(problem, schedule.rows)) / planned
    learnt = makespan(learnt_from(schedule, tasks[0]))
    overheads = sorted(x for r in results for spans in r.spans for x in between_tasks(spans))
    seconds = seconds_of(forward_s)
    found = [lost(schedule, part, seconds) for part in tasks]
    return {
        "ranks": num_ranks,
        "forward_ms": forward_s * 1e3,
        "message_kb": way.rows,
        "split_weight": split,
        "carrier": way.carrier,
        "planned_s": round(planned, 4),
        "measured_over_planned": round(statistics.median(ratios), 4),
        "best_over_planned": round(min(ratios), 4),
        "with_setup_over_planned": round(statistics.median(whole), 4),
        "over_replayed": round(
            statistics.median(
                ratio * planned / replay(schedule, part)
                for ratio, part in zip(ratios, tasks, strict=True)
            ),
            4,
        ),
        **{
            f"lost_{name}": round(statistics.median(parts) / planned, 4)
            for name, parts in (
                ("in_tasks", [f.in_tasks for f in found]),
                ("between", [f.between for f in found]),
                ("for_messages", [f.for_messages for f in found]),
            )
        },
        "message_us": round(latency_s * 1e6, 1),
        "over_latency": round(statistics.median(ratios) / with_latency, 4),
        "over_learnt": round(statistics.median(ratios[1:]) * planned / learnt, 4),
        "bare_over_planned": round(statistics.median(bare), 4) if bare else 0.0,
        "task_over_planned": round(
            statistics.mean(
                s.duration_s / seconds[Op(s.kind.value)] for part in tasks for s in part
            ),
            4,
        ),
        "cpu_us_per_task": round(statistics.mean(x for r in results for x in r.cpu_s) * 1e6, 1),
        "overhead_us_p50": round(statistics.median(overheads) * 1e6, 1),
        "overhead_us_p99": round(overheads[int(0.99 * len(overheads))] * 1e6, 1),
    }


def learnt_from(schedule: Schedule, tasks: Sequence[Span]) -> Schedule:
    """The same orders, planned with what one run of them measured."""

    def mean(kind: Kind) -> float:
        return statistics.mean([s.duration_s for s in tasks if s.kind is kind] or [0.0])

    forward, weight = mean(Kind.F), mean(Kind.W)
    backward = mean(Kind.B) or mean(Kind.I) + weight
    pipelines = tuple(
        Pipeline.make(p.name, p.stages, p.num_microbatches, forward, backward, weight=weight)
        for p in schedule.problem.pipelines
    )
    latency_s = statistics.median(message_times(schedule, tasks))
    problem = replace(schedule.problem, pipelines=pipelines, link_latency=latency_s)
    return Schedule(problem, schedule.rows)


def message_times(schedule: Schedule, tasks: Sequence[Span]) -> list[float]:
    """Seconds from a task's end to the start of a task of another rank that waited for it."""
    by_name = {span.name: span for span in tasks}
    found = []
    for row in schedule.rows:
        for before, task in itertools.pairwise(row):
            made = [by_name[str(t)] for t in sources(schedule, task) if str(t) in by_name]
            mine, free_s = by_name[str(task)], by_name[str(before)].end_s
            found += [
                mine.start_s - s.end_s for s in made if s.lane != mine.lane and s.end_s > free_s
            ]
    return found


def between_tasks(spans: Sequence[Span]) -> list[float]:
    """Seconds of one rank from task to task, without waits."""
    busy = [span for span in spans if span.kind in TASKS]
    waits = [span for span in spans if span.kind is Kind.WAIT]
    return [
        after.start_s
        - before.end_s
        - sum(s.duration_s for s in waits if before.end_s <= s.start_s <= after.start_s)
        for before, after in itertools.pairwise(busy)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--forward-ms", type=float, nargs="+", default=[10.0, 5.0])
    parser.add_argument("--carriers", nargs="+", default=["local", "gloo"])
    parser.add_argument("--repeats", type=int, default=15, help="at least 2")
    parser.add_argument("--rows", type=int, default=64, help="rows of 1 KB in a message")
    parser.add_argument("--plain-sleep", action="store_true", help="tasks oversleep")
    parser.add_argument("--name", default="bench_fidelity", help="of the result")
    asked = parser.parse_args()
    gain = 0.0 if asked.plain_sleep else GAIN
    rows = [
        fidelity(ranks, milliseconds / 1e3, split, Way(asked.repeats, asked.rows, carrier, gain))
        for ranks in asked.ranks
        for milliseconds in asked.forward_ms
        for split in (False, True)
        for carrier in asked.carriers
    ]
    print_table(rows)
    print(write_result(asked.name, rows))


if __name__ == "__main__":
    main()
