"""Megatron's schedules and ours on the same models, side by side in one run (CPU, gloo).

    python -m bench.bench_megatron pair --ranks 2 --microbatches 2 4 8
    python -m bench.bench_megatron pair --ranks 4 --microbatches 4 --device-ms 10
    python -m bench.bench_megatron overhead
    python -m bench.bench_megatron all

`pair`: an actor and a critic (value head, reversed pipeline), both real GPTModels under Megatron's
DDP, one thread per rank. Every round runs every variant once, so that all see the same machine;
medians of seconds per forward-backward of both models, and of how many times as fast that was as
Megatron's 1F1B and interleaved schedules in the same round. `--device-ms`: for more ranks than
cores: tiny models whose tasks also sleep, as a host does while its device computes (forward and
input gradient so many milliseconds each, weight gradients as many together).
`overhead`: microseconds per task beyond Megatron's, with models that compute almost nothing.
`all`: two ranks that compute and that sleep, four that sleep, the overhead, in five minutes; writes
megatron_2_ranks, megatron_4_ranks and megatron_overhead.
*Fused, memory as interleaved*: holds at most what Megatron's interleaved schedule holds at its peak
(activations of one model at a time), both models together.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import megatron.core
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import layers

from bench.record import print_table, spread, write_result
from rlhfuse.megatron import stock
from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.dropin import Scheduler
from rlhfuse.megatron.fused import FusedScheduler
from rlhfuse.megatron.measure import measured_costs
from rlhfuse.megatron.orders import Costs, Shape, default_order, problem_for
from rlhfuse.megatron.values import make_value_model
from rlhfuse.schedules.checks import peak_memory
from tests.megatron.tiny import Setting, Trained, init_parallel
from tests.training.ranks import run_ranks

Calls = Mapping[str, dict[str, Any]]
Variant = Callable[[Calls], object]
Row = dict[str, float | int | str]


class Pair:
    """An actor and a reversed critic, each in its own parallel state."""

    def __init__(self, actor: Setting, critic: Setting, device_s: float) -> None:
        self.contexts = {
            "actor": ModelContext.create(partial(init_parallel, actor)),
            "critic": ModelContext.create(partial(init_parallel, critic), reverse=True),
        }
        self.models = {}
        for name, setting in (("actor", actor), ("critic", critic)):
            with self.contexts[name].active():
                head = make_value_model if setting.value_head else None
                self.models[name] = Trained(setting, head)
        self._device_s = device_s

    def calls(self) -> dict[str, dict[str, Any]]:
        found = {}
        for name, model in self.models.items():
            with self.contexts[name].active():
                model.zero()
                found[name] = model.arguments()
                if self._device_s:
                    step = found[name]["forward_step_func"]
                    found[name]["forward_step_func"] = partial(_sleeping, step, self._device_s)
        return found

    def serial(self, functions: Mapping[str, stock.ForwardBackward], calls: Calls) -> None:
        for name, arguments in calls.items():
            with self.contexts[name].active():
                functions[name](**arguments)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seconds: float) -> torch.Tensor:
        ctx.seconds = seconds
        time.sleep(seconds)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


def _sleeping(step: Any, seconds: float, data: Any, model: Any, *rest: Any) -> Any:
    output, loss_func = step(data, model, *rest)
    slept: torch.Tensor = _Sleep.apply(output, seconds)  # type: ignore[no-untyped-call]
    return slept, loss_func


def _sleep_for_weights(seconds_per_linear: float) -> None:
    """Both backward passes, Megatron's and ours, call this once for each weight gradient."""
    prepare = layers.prepare_input_tensors_for_wgrad_compute

    def prepared(*tensors: torch.Tensor) -> Any:
        time.sleep(seconds_per_linear)
        return prepare(*tensors)

    layers.prepare_input_tensors_for_wgrad_compute = prepared


def settings(ranks: int, m: int, device_ms: float, chunks: int = 1) -> tuple[Setting, Setting]:
    small = {"hidden": 16, "num_layers": 2 * ranks, "lengths": (8,)}
    large = {"hidden": 192, "num_layers": 4 * ranks, "lengths": (128,)}
    shape: Any = small if device_ms else large
    actor = Setting(pp=ranks, num_microbatches=m, chunks=chunks, **shape)
    critic = Setting(pp=ranks, num_microbatches=m, chunks=chunks, value_head=True, seed=1, **shape)
    return actor, critic


def costs_of(pair: Pair) -> dict[str, Costs]:
    """Measured task times of both models, split."""
    costs = {}
    for name, arguments in pair.calls().items():
        probe = Scheduler("zero-bubble", record=True)
        with pair.contexts[name].active():
            for _ in range(2):
                probe.get_forward_backward_func()(**arguments)
                arguments = pair.calls()[name]
        costs[name] = measured_costs(probe.timeline)["model"]
        probe.close()
    return costs


def interleaved_peak(ranks: int, m: int) -> float:
    """Most activations that a rank holds under interleaved 1F1B with two chunks; 1 is that of one
    micro-batch on a stage of the model that is not cut into chunks."""
    shape = Shape(tuple(range(ranks)), 2, m, False)
    problem = problem_for({"model": shape}, {"model": Costs(activation=0.5)})
    return max(peak_memory(default_order(problem)))


def variants(pair: Pair, costs: Mapping[str, Costs]) -> dict[str, tuple[Pair, Variant]]:
    def each(schedule: str) -> Variant:
        return partial(
            pair.serial,
            {
                name: Scheduler(schedule, costs[name]).get_forward_backward_func()
                for name in pair.models
            },
        )

    own = dict.fromkeys(pair.models, stock.stock_func(len_of(pair), None, None))
    found: dict[str, tuple[Pair, Variant]] = {"Megatron 1F1B": (pair, partial(pair.serial, own))}
    for label, schedule in (("drop-in 1F1B", "1f1b"), ("drop-in zero-bubble", "zero-bubble")):
        found[label] = (pair, each(schedule))
    for label, schedule in (("fused", "fuse"), ("fused with W", "fuse-split")):
        found[label] = (pair, partial(FusedScheduler(schedule, costs), contexts=pair.contexts))
    return found


def len_of(pair: Pair) -> int:
    return int(pair.models["actor"].setting.pp)


def measure(ranks: int, m: int, rounds: int, device_ms: float, rank: int) -> list[Row]:
    with on_cpu():
        if device_ms:
            # 2 layers a stage, 4 linear layers each
            _sleep_for_weights(device_ms * 1e-3 / 8)
        pair = Pair(*settings(ranks, m, device_ms), device_ms * 1e-3)
        costs = costs_of(pair)
        runs = variants(pair, costs)
        if m % ranks == 0:
            chunked = Pair(*settings(ranks, m, device_ms, chunks=2), device_ms * 1e-3 / 2)
            own = dict.fromkeys(chunked.models, stock.stock_func(ranks, 2, None))
            runs["Megatron interleaved"] = (chunked, partial(chunked.serial, own))
            capped = FusedScheduler("fuse-split", costs, memory_cap=interleaved_peak(ranks, m))
            together = partial(capped, contexts=pair.contexts)
            runs["fused with W, memory as interleaved"] = (pair, together)
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, (models, run) in runs.items():
                calls = models.calls()
                dist.barrier()
                start = time.perf_counter()
                run(calls)
                dist.barrier()
                if number:
                    times[name].append(time.perf_counter() - start)
    base = times["Megatron 1F1B"]
    interleaved = times.get("Megatron interleaved")
    rows: list[Row] = []
    for name, seconds in times.items():
        median, least, most = spread(seconds)
        rows.append(
            {
                "megatron": megatron.core.__version__,
                "ranks": ranks,
                "microbatches": m,
                "device_ms": device_ms,
                "variant": name,
                "median_s": median,
                "least_s": least,
                "most_s": most,
                "speedup": ratio(base, seconds),
                "to_interleaved": ratio(interleaved, seconds) if interleaved else "",
            }
        )
    return rows


def ratio(base: Sequence[float], seconds: Sequence[float]) -> float:
    """Median over the rounds of how many times as fast as `base`."""
    return statistics.median(b / s for b, s in zip(base, seconds, strict=True))


def overhead(rounds: int, rank: int) -> list[Row]:
    setting = Setting(hidden=8, num_layers=2, num_microbatches=32, lengths=(4,), ddp=False)
    with on_cpu():
        init_parallel(setting)
        model = Trained(setting)
        runs = {
            "Megatron 1F1B": stock.stock_func(None, None, None),
            "drop-in 1F1B": Scheduler().get_forward_backward_func(),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for number in range(rounds + 1):
            for name, run in runs.items():
                arguments = model.arguments()
                dist.barrier()
                start = time.perf_counter()
                run(**arguments)
                if number:
                    times[name].append(time.perf_counter() - start)
    tasks = 2 * setting.num_microbatches

    def extra(seconds: Sequence[float]) -> list[float]:
        return [s - b for s, b in zip(seconds, times["Megatron 1F1B"], strict=True)]

    return [
        {
            "megatron": megatron.core.__version__,
            "variant": name,
            "us_per_task": 1e6 * statistics.median(seconds) / tasks,
            "us_beyond_megatron": 1e6 * statistics.median(extra(seconds)) / tasks,
        }
        for name, seconds in times.items()
    ]


def pairs(ranks: int, counts: Sequence[int], rounds: int, device_ms: float) -> list[Row]:
    rows: list[Row] = []
    for m in counts:
        job = partial(measure, ranks, m, rounds, device_ms)
        rows += run_ranks(ranks, job, timeout_s=120, limit_s=500)[0]
    return rows


def overheads(rounds: int) -> list[Row]:
    return run_ranks(2, partial(overhead, rounds), limit_s=300)[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["pair", "overhead", "all"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device-ms", type=float, default=0.0)
    parser.add_argument("--save", metavar="NAME", help="write bench/results/NAME.json")
    asked = parser.parse_args(arguments)
    for name, rows in measured(asked):
        print_table(rows)
        print(json.dumps(rows), flush=True)
        if name:
            write_result(name, rows)


def measured(asked: argparse.Namespace) -> Iterator[tuple[str, list[Row]]]:
    """Rows, and the name to keep them under, as they are measured."""
    if asked.what == "all":
        yield "megatron_overhead", overheads(asked.rounds)
        yield "megatron_4_ranks", pairs(4, [4], asked.rounds, 20.0)
        computing = pairs(2, [2, 4], asked.rounds, 0.0)
        yield "megatron_2_ranks", computing + pairs(2, [2], asked.rounds, 20.0)
    elif asked.what == "overhead":
        yield asked.save or "", overheads(asked.rounds)
    else:
        rows = pairs(asked.ranks, asked.microbatches, asked.rounds, asked.device_ms)
        yield asked.save or "", rows


if __name__ == "__main__":
    main()
