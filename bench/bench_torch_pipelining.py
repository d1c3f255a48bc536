"""Is one model's pipeline at least as fast here as under torch.distributed.pipelining?

    python -m bench.bench_torch_pipelining --microbatches 4 8

The same modules, inputs and ranks: torch's Schedule1F1B and ZBV against our executor running 1F1B,
ZB-H1 and ZB-V, each pair one after the other in one run. A speed-up is the median over pairs of
neighbours, with the interval that holds the true median with 95 % confidence; processor time
counts all threads of all ranks. Gradients are compared before anything is timed. Both find
the gradients' global norm (theirs as torch.nn.utils does it); neither steps an optimizer; ours
alone records spans.

With many rows a step is matrix products, which are the same on both sides; with few it is what the
runtimes themselves cost.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleZBVZeroBubble
from torch.nn import functional

from bench.ranks import Turns, run_ranks, say
from bench.record import Row, print_table, write_result
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import one_f_one_b, zb_h1
from rlhfuse.schedules.zero_bubble import zb_v
from rlhfuse.training.fused_step import Batch, FusedStep, Model

CPU = torch.device("cpu")
NUM_RANKS = 2
Gradients = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Size:
    """Of a step: micro-batches of so many rows, through blocks of a width."""

    microbatches: int
    rows: int
    width: int
    blocks: int


class Block(nn.Module):
    """A transformer block's matrix products and norm, without attention's bookkeeping."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = rows + self.down(functional.silu(self.up(self.norm(rows))))
        return out


def make_stage(number: int, blocks: int, width: int) -> nn.Module:
    """Stage `number` of a model, the same on every call."""
    torch.manual_seed(number)
    return nn.Sequential(*(Block(width) for _ in range(blocks)))


def make_data(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [microbatches * rows, width]."""
    generator = torch.Generator().manual_seed(7)
    shape = (size.microbatches * size.rows, size.width)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def torch_runner(
    size: Size, rank: int, *, v_shape: bool
) -> tuple[Callable[[], None], dict[int, nn.Module]]:
    """One step under torch's own runtime, and this rank's modules."""
    num_stages = 2 * NUM_RANKS if v_shape else NUM_RANKS
    mine = (rank, num_stages - 1 - rank) if v_shape else (rank,)
    modules = {s: make_stage(s, size.blocks // num_stages, size.width) for s in mine}
    stages: list[Any] = [PipelineStage(m, s, num_stages, CPU) for s, m in modules.items()]
    inputs, targets = make_data(size)
    schedule = (
        ScheduleZBVZeroBubble(stages, size.microbatches, loss_fn=functional.mse_loss)
        if v_shape
        else Schedule1F1B(stages[0], size.microbatches, loss_fn=functional.mse_loss)
    )
    first, last = 0 in modules, num_stages - 1 in modules

    def step() -> None:
        given = (inputs,) if first else ()
        schedule.step(*given, target=targets) if last else schedule.step(*given)
        gradients = [p.grad for m in modules.values() for p in m.parameters() if p.grad is not None]
        square = torch.nn.utils.get_total_norm(gradients).square()
        dist.all_reduce(square)

    return step, modules


def our_runner(
    size: Size, schedule: Schedule, rank: int
) -> tuple[Callable[[], None], dict[int, nn.Module]]:
    """One step of `schedule` under our executor, and this rank's modules."""
    (pipe,) = schedule.problem.pipelines
    count, num_stages = size.microbatches, pipe.num_stages
    modules = {
        s: make_stage(s, size.blocks // num_stages, size.width)
        for s, home in enumerate(pipe.stages)
        if home == rank
    }
    split = any(task.op.value == "W" for row in schedule.rows for task in row)
    model = Model("model", tuple(pipe.stages), modules, split_weight=split)
    fused = FusedStep([model], rank=rank, device=CPU, dtype=torch.float32)
    inputs, targets = make_data(size)
    batch = Batch(
        [(size.rows, size.width)] * count,
        lambda mb: inputs.chunk(count)[mb],
        lambda mb, out: functional.mse_loss(out, targets.chunk(count)[mb]) / count,
    )

    def step() -> None:
        fused.update({"model": batch}, schedule)

    return step, modules


def our_schedules(count: int) -> dict[str, Schedule]:
    """By the name of torch's schedule that each is compared with, and ours."""
    straight = Problem(NUM_RANKS, (Pipeline.make("model", (0, 1), count, 1, 2, weight=1),))
    v_shape = Problem(
        NUM_RANKS,
        (
            Pipeline.make(
                "model", (0, 1, 1, 0), count, 0.5, 1, weight=0.5, activation=0.5, interleaved=True
            ),
        ),
    )
    return {
        "ours 1F1B": one_f_one_b(straight),
        "ours ZB-H1": zb_h1(straight),
        "ours ZB-V": zb_v(v_shape),
    }


PAIRS = (("torch 1F1B", "ours 1F1B"), ("torch 1F1B", "ours ZB-H1"), ("torch ZBV", "ours ZB-V"))
Runner = tuple[Callable[[], None], dict[int, nn.Module]]


@dataclass(frozen=True, slots=True)
class Taken:
    """What one step took on one rank: until all ranks were done, and of processors (all threads,
    those of gloo too)."""

    wall_s: float
    cpu_s: float


def measure(size: Size, most: int, limit_s: float) -> list[Row]:
    """Every pair in turn, theirs and ours next to each other, up to `most` times."""
    say(f"{size.microbatches} micro-batches of {size.rows} rows")

    def run(rank: int) -> list[list[tuple[Taken, Taken]]]:
        runners: dict[str, Runner] = {
            "torch 1F1B": torch_runner(size, rank, v_shape=False),
            "torch ZBV": torch_runner(size, rank, v_shape=True),
        }
        for name, schedule in our_schedules(size.microbatches).items():
            runners[name] = our_runner(size, schedule, rank)
        for step, _ in runners.values():
            step()
        for theirs, ours in PAIRS:
            _compare(runners, theirs, ours)
        taken: list[list[tuple[Taken, Taken]]] = [[] for _ in PAIRS]
        turns = Turns(most, limit_s)
        while turns.another(rank):
            for (theirs, ours), pairs in zip(PAIRS, taken, strict=True):
                if turns.done % 2:  # neither has the better place
                    first = _take(runners[theirs])
                    pairs.append((first, _take(runners[ours])))
                else:
                    first = _take(runners[ours])
                    pairs.append((_take(runners[theirs]), first))
        return taken

    per_rank = run_ranks(NUM_RANKS, run)
    return [
        _row(size, theirs, ours, [rank[number] for rank in per_rank])
        for number, (theirs, ours) in enumerate(PAIRS)
    ]


def _take(runner: Runner) -> Taken:
    """One step, from where all ranks begin to where all are done."""
    step, modules = runner
    for module in modules.values():
        module.zero_grad()
    dist.barrier()
    start_s, cpu_start_s = time.perf_counter(), time.process_time()
    step()
    dist.barrier()
    return Taken(time.perf_counter() - start_s, time.process_time() - cpu_start_s)


def _row(size: Size, theirs: str, ours: str, ranks: list[list[tuple[Taken, Taken]]]) -> Row:
    """Ratios are of neighbours in time: what the machine does meanwhile, both suffer."""
    pairs = ranks[0]
    speedups = sorted(their.wall_s / our.wall_s for their, our in pairs)
    low, high = median_between(speedups)
    cpu = [
        (sum(rank[i][0].cpu_s for rank in ranks), sum(rank[i][1].cpu_s for rank in ranks))
        for i in range(len(pairs))
    ]
    return {
        "rows": size.rows,
        "microbatches": size.microbatches,
        "theirs": theirs,
        "ours": ours,
        "pairs": len(pairs),
        "their_s": statistics.median(their.wall_s for their, _ in pairs),
        "our_s": statistics.median(our.wall_s for _, our in pairs),
        "speedup": statistics.median(speedups),
        "at_least": low,
        "at_most": high,
        "their_cpu_s": statistics.median(their for their, _ in cpu),
        "our_cpu_s": statistics.median(our for _, our in cpu),
        "cpu_speedup": statistics.median(their / our for their, our in cpu),
    }


def median_between(ordered: Sequence[float]) -> tuple[float, float]:
    """Where the true median lies with 95 % confidence, whatever the distribution: between the
    values of those ranks that binomial chance says (least and greatest where there are few)."""
    count, outside, below = len(ordered), 0.0, 0
    while (outside := outside + math.comb(count, below) * 0.5**count) <= 0.025:
        below += 1
    below = max(0, below - 1)
    return ordered[below], ordered[count - 1 - below]


def _compare(runners: dict[str, Runner], theirs: str, ours: str) -> None:
    """Gradients of this rank are equal, to the rounding of a sum over micro-batches."""
    for stage, module in runners[theirs][1].items():
        own = dict(runners[ours][1][stage].named_parameters())
        for name, parameter in module.named_parameters():
            other = own[name].grad
            assert parameter.grad is not None, name
            assert other is not None, name
            close = torch.allclose(parameter.grad, other, rtol=1e-4, atol=1e-7)
            assert close, f"{ours}: gradient of {stage}.{name} differs from that of {theirs}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, nargs="+", default=[512, 32], help="of a micro-batch")
    parser.add_argument("--repeats", type=int, default=60, help="at most")
    parser.add_argument("--limit-s", type=float, default=480, help="of measuring, in all")
    asked = parser.parse_args()
    sizes = [
        Size(count, rows, asked.width, asked.blocks)
        for rows in asked.rows
        for count in asked.microbatches
    ]
    limit_s = asked.limit_s / len(sizes)
    rows = [row for size in sizes for row in measure(size, asked.repeats, limit_s)]
    print_table(rows)
    print(write_result("bench_torch_pipelining", rows))


if __name__ == "__main__":
    main()
