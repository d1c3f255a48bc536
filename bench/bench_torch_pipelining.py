"""Is one model's pipeline at least as fast here as under torch.distributed.pipelining?

    python -m bench.bench_torch_pipelining --microbatches 4 8

The same modules, inputs and ranks, in turn in one run: torch's Schedule1F1B and ZBV against our
executor running 1F1B, ZB-H1 and ZB-V. Gradients are compared before anything is timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
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


def make_data(asked: argparse.Namespace, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets [count * rows, width]."""
    generator = torch.Generator().manual_seed(7)
    shape = (count * asked.rows, asked.width)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def torch_runner(
    asked: argparse.Namespace, count: int, rank: int, *, v_shape: bool
) -> tuple[Callable[[], None], dict[int, nn.Module]]:
    """One step under torch's own runtime, and this rank's modules."""
    num_stages = 2 * NUM_RANKS if v_shape else NUM_RANKS
    mine = (rank, num_stages - 1 - rank) if v_shape else (rank,)
    modules = {s: make_stage(s, asked.blocks // num_stages, asked.width) for s in mine}
    stages: list[Any] = [PipelineStage(m, s, num_stages, CPU) for s, m in modules.items()]
    inputs, targets = make_data(asked, count)
    schedule = (
        ScheduleZBVZeroBubble(stages, count, loss_fn=functional.mse_loss)
        if v_shape
        else Schedule1F1B(stages[0], count, loss_fn=functional.mse_loss)
    )
    first, last = 0 in modules, num_stages - 1 in modules

    def step() -> None:
        given = (inputs,) if first else ()
        schedule.step(*given, target=targets) if last else schedule.step(*given)

    return step, modules


def our_runner(
    asked: argparse.Namespace, schedule: Schedule, rank: int
) -> tuple[Callable[[], None], dict[int, nn.Module]]:
    """One step of `schedule` under our executor, and this rank's modules."""
    (pipe,) = schedule.problem.pipelines
    count, num_stages = pipe.num_microbatches, pipe.num_stages
    modules = {
        s: make_stage(s, asked.blocks // num_stages, asked.width)
        for s, home in enumerate(pipe.stages)
        if home == rank
    }
    split = any(task.op.value == "W" for row in schedule.rows for task in row)
    model = Model("model", tuple(pipe.stages), modules, split_weight=split)
    fused = FusedStep([model], rank=rank, device=CPU, dtype=torch.float32)
    inputs, targets = make_data(asked, count)
    batch = Batch(
        [(asked.rows, asked.width)] * count,
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


def measure(asked: argparse.Namespace, count: int) -> list[Row]:
    """Every runner in turn, up to `repeats` times."""
    say(f"{count} micro-batches")

    def run(rank: int) -> dict[str, list[float]]:
        runners = {
            "torch 1F1B": torch_runner(asked, count, rank, v_shape=False),
            "torch ZBV": torch_runner(asked, count, rank, v_shape=True),
        }
        for name, schedule in our_schedules(count).items():
            runners[name] = our_runner(asked, schedule, rank)
        for step, _ in runners.values():
            step()
        _compare(runners, "torch 1F1B", "ours 1F1B")
        _compare(runners, "torch 1F1B", "ours ZB-H1")
        _compare(runners, "torch ZBV", "ours ZB-V")
        seconds: dict[str, list[float]] = {name: [] for name in runners}
        turns = Turns(asked.repeats, asked.limit_s / len(asked.microbatches))
        while turns.another(rank):
            for name, (step, modules) in runners.items():
                for module in modules.values():
                    module.zero_grad()
                dist.barrier()
                start_s = time.perf_counter()
                step()
                dist.barrier()
                seconds[name].append(time.perf_counter() - start_s)
        return seconds

    per_rank = run_ranks(NUM_RANKS, run)
    medians = {name: statistics.median(values) for name, values in per_rank[0].items()}
    against = {"ours 1F1B": "torch 1F1B", "ours ZB-H1": "torch 1F1B", "ours ZB-V": "torch ZBV"}
    return [
        {
            "microbatches": count,
            "runtime": name,
            "seconds": median,
            "least_s": min(per_rank[0][name]),
            "against": against.get(name, name),
            "speedup": medians[against.get(name, name)] / median,
        }
        for name, median in medians.items()
    ]


def _compare(
    runners: dict[str, tuple[Callable[[], None], dict[int, nn.Module]]], theirs: str, ours: str
) -> None:
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
    parser.add_argument("--rows", type=int, default=512, help="of a micro-batch")
    parser.add_argument("--repeats", type=int, default=15, help="at most")
    parser.add_argument("--limit-s", type=float, default=120, help="of measuring, in all")
    asked = parser.parse_args()
    rows = [row for count in asked.microbatches for row in measure(asked, count)]
    print_table(rows)
    print(write_result("bench_torch_pipelining", rows))


if __name__ == "__main__":
    main()
