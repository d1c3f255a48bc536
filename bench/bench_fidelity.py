"""How much longer does a schedule take than planned, and what does the executor cost a task?

    python -m bench.bench_fidelity --ranks 8 16 --forward-ms 10 5

Tasks sleep (forward once, backward twice the given time), so that cores do not matter: what is
left is messages, bookkeeping and the timer (whose slack, 50 us on Linux, is set to 0: the sleep
stands for computing, which ends when it is done). `measured` is from the first task's start to the
last one's end, `with_setup` from the call to its return on all ranks, `task_over_planned` the part
that the sleeping itself adds, `cpu_us_per_task` the processor time of all that is not sleep.
Beside it, in turn, the same messages between the same sleeping ranks without the executor
(`bench.bare_gloo`): `bare_over_planned` is the floor on this machine, `over_bare` what the executor
adds to it.
"""

import argparse
import ctypes
import itertools
import statistics
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from bench.bare_gloo import BareGloo
from bench.ranks import run_ranks, say
from bench.record import Row, print_table, write_result
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Op, Pipeline, Problem
from rlhfuse.schedules.timing import makespan
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.channels import Channels
from rlhfuse.training.clock import HostClock
from rlhfuse.training.executor import Executor

CPU = torch.device("cpu")
PR_SET_TIMERSLACK = 29
TASKS = (Kind.F, Kind.B, Kind.I, Kind.W)


class Sleeper:
    """A stage whose tasks sleep."""

    def __init__(self, forward_s: float, shape: tuple[int, int]) -> None:
        self._forward_s = forward_s
        self._message = torch.zeros(shape)

    def forward(self, microbatch: int, received: torch.Tensor | None) -> torch.Tensor | None:
        time.sleep(self._forward_s)
        return self._message

    def backward(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        time.sleep(2 * self._forward_s)
        return self._message

    def input_gradient(self, microbatch: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        time.sleep(self._forward_s)
        return self._message

    def weight_gradient(self, microbatch: int) -> None:
        time.sleep(self._forward_s)


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
    """One rank. `walls`: per repeat the call, first start, last end, return, and bare start and
    end; `stretch`: of each task, over its plan."""

    walls: list[tuple[float, ...]]
    overheads: list[float]
    stretch: list[float]
    cpu_s: float  # a task
    bare_cpu_s: float


def seconds_of(forward_s: float) -> dict[Op, float]:
    return {Op.F: forward_s, Op.B: 2 * forward_s, Op.I: forward_s, Op.W: forward_s}


def fidelity(num_ranks: int, forward_s: float, repeats: int, rows: int, split: bool) -> Row:
    """One table row: `repeats` runs of a fused schedule on `num_ranks` processes."""
    say(f"{num_ranks} ranks, {forward_s * 1e3:g} ms, {'F I W' if split else 'F B'}: searching")
    problem = two_models(num_ranks, 2 * num_ranks, forward_s)
    schedule = fuse(problem, iterations=40, split_weight=split)
    shape = (rows, 256)

    def run(rank: int) -> Measured:
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
        ranks = {pipe.name: pipe.stages for pipe in problem.pipelines}
        channels = Channels(
            rank, ranks, device=CPU, dtype=torch.float32, timeout=timedelta(seconds=60)
        )
        runners = {
            (name, stages.index(rank)): Sleeper(forward_s, shape) for name, stages in ranks.items()
        }
        executor = Executor(rank, channels, runners, HostClock(), _get_default_store())
        shapes = {name: [shape] * 2 * num_ranks for name in ranks}
        bare = BareGloo(schedule, rank, seconds_of(forward_s), shape)
        walls: list[tuple[float, ...]] = []
        overheads, stretch = [], []
        used_s, bare_used_s, tasks = 0.0, 0.0, 0
        for _ in range(repeats):
            dist.barrier()
            cpu_s = time.process_time()
            floor = bare.run(ahead=2)
            bare_used_s += time.process_time() - cpu_s
            dist.barrier()
            start, cpu_s = time.monotonic(), time.process_time()
            spans: list[Span] = []
            executor.run(schedule, shapes, spans)
            end = time.monotonic()
            used_s += time.process_time() - cpu_s
            busy = [span for span in spans if span.kind in TASKS]
            walls.append((start, busy[0].start_s, busy[-1].end_s, end, *floor))
            tasks += len(busy)
            stretch += [s.duration_s / seconds_of(forward_s)[Op(s.kind.value)] for s in busy]
            for before, after in itertools.pairwise(busy):
                waited = sum(
                    s.duration_s
                    for s in spans
                    if s.kind is Kind.WAIT and before.end_s <= s.start_s <= after.start_s
                )
                overheads.append(after.start_s - before.end_s - waited)
        return Measured(walls, overheads, stretch, used_s / tasks, bare_used_s / tasks)

    planned = makespan(schedule)
    say(f"  running {repeats} times {planned:.2f} s")
    results = run_ranks(num_ranks, run)
    ratios, whole, floor = (
        [
            (max(r.walls[i][last] for r in results) - min(r.walls[i][first] for r in results))
            / planned
            for i in range(repeats)
        ]
        for first, last in ((1, 2), (0, 3), (4, 5))
    )
    overheads = sorted(o for result in results for o in result.overheads)
    return {
        "ranks": num_ranks,
        "forward_ms": forward_s * 1e3,
        "message_kb": rows,
        "split_weight": split,
        "planned_s": round(planned, 4),
        "measured_over_planned": round(statistics.median(ratios), 4),
        "with_setup_over_planned": round(statistics.median(whole), 4),
        "best_over_planned": round(min(ratios), 4),
        "bare_over_planned": round(statistics.median(floor), 4),
        "over_bare": round(statistics.median(a / b for a, b in zip(ratios, floor, strict=True)), 4),
        "task_over_planned": round(statistics.mean(x for r in results for x in r.stretch), 4),
        "cpu_us_per_task": round(statistics.mean(r.cpu_s for r in results) * 1e6, 1),
        "bare_cpu_us_per_task": round(statistics.mean(r.bare_cpu_s for r in results) * 1e6, 1),
        "overhead_us_p50": round(statistics.median(overheads) * 1e6, 1),
        "overhead_us_p99": round(overheads[int(0.99 * len(overheads))] * 1e6, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--forward-ms", type=float, nargs="+", default=[10.0, 5.0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rows", type=int, default=64, help="rows of 1 KB in a message")
    asked = parser.parse_args()
    rows = [
        fidelity(ranks, milliseconds / 1e3, asked.repeats, asked.rows, split)
        for ranks in asked.ranks
        for milliseconds in asked.forward_ms
        for split in (False, True)
    ]
    print_table(rows)
    print(write_result("bench_fidelity", rows))


if __name__ == "__main__":
    main()
