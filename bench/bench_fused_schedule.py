"""Fused schedules against lower bounds, FlexFusion's published results and serial baselines.

    python bench/bench_fused_schedule.py flexfusion REFERENCE.json --budget-s 30 -o OUT.json
    python bench/bench_fused_schedule.py random --budget-s 1 --count 20 -o OUT.json
    python bench/bench_fused_schedule.py speed -o OUT.json

`flexfusion` needs the reference file with the 12 published problems. One core; searches run one
after the other, after one run that loads the compiled code.
"""

import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np

from rlhfuse.schedules.compiled import encode_schedule, run_rows
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import serial, zb_h1
from rlhfuse.schedules.summary import summarize
from rlhfuse.schedules.timing import check_channels, makespan

Row = dict[str, object]


@click.group()
def main() -> None:
    """Benchmarks of `rlhfuse.schedules`."""


@main.command()
@click.argument("reference", type=click.Path(path_type=Path, exists=True))
@click.option("--budget-s", type=float, default=30.0)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def flexfusion(reference: Path, budget_s: float, output: Path | None) -> None:
    """The 12 published problems at the authors' best published peak memory."""
    instances = json.loads(reference.read_text())["instances"]
    _warm()
    rows: list[Row] = []
    for instance in instances:
        cap = instance["flexfusion"]["peak_memory"]
        problem = _flexfusion_problem(instance, cap)
        for split in (False, True):
            row = _measure(problem, budget_s, split)
            row |= {
                "id": instance["id"],
                "cap": cap,
                "flexfusion": instance["flexfusion"]["latency"],
                "bound_without_split": instance["latency_lower_bound"],
                "seen_with_split": instance["seen_with_weight_split_at_that_peak"],
                "serial_zb_h1": instance["serial_zero_bubble_h1"],
            }
            print(row, flush=True)
            rows.append(row)
    _save(output, rows)


@main.command(name="random")
@click.option("--budget-s", type=float, multiple=True, default=(0.05, 1.0))
@click.option("--count", type=int, default=200)
@click.option("-o", "--output", type=click.Path(path_type=Path))
def random_problems(budget_s: tuple[float, ...], count: int, output: Path | None) -> None:
    """Random problems, seeds 0 to count - 1: gap to the bound, and gains over serial schedules."""
    _warm()
    rows: list[Row] = []
    for seed in range(count):
        problem = random_problem(seed)
        for split in (False, True):
            baselines = {
                "serial": makespan(serial(problem)),
                "zb_h1": makespan(zb_h1(problem)),
            }
            for budget in budget_s:
                row = _measure(problem, budget, split) | baselines | {"seed": seed}
                rows.append(row)
    for split in (False, True):
        for budget in budget_s:
            chosen = [r for r in rows if r["split"] is split and r["budget_s"] == budget]
            gaps = np.array([float(str(r["gap"])) for r in chosen])
            print(f"{split=} {budget=}: mean gap {gaps.mean():.4f}, worst {gaps.max():.4f}")
    _save(output, rows)


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path))
def speed(output: Path | None) -> None:
    """Simulated tasks per second, one core."""
    rows: list[Row] = []
    for ranks, m in ((4, 8), (8, 32), (16, 64), (64, 256)):
        schedule = serial(_pair(ranks, m))
        rate = _simulation_rate(schedule)
        print(f"{ranks} ranks, {m} micro-batches: {rate / 1e6:.1f} million tasks a second")
        rows.append({"ranks": ranks, "microbatches": m, "tasks_per_s": rate})
    _save(output, rows)


def random_problem(seed: int) -> Problem:
    """Uneven stages, two or three models, sizes that need not divide, links, uneven batches."""
    rng = np.random.default_rng(seed)
    ranks = int(rng.integers(2, 13))
    pipelines = [_random_pipeline("actor", list(range(ranks)), rng, forward_only=False)]
    size = int(rng.integers(1, ranks + 1))
    for copy in range(ranks // size):
        home = list(range(copy * size, (copy + 1) * size))[::-1]
        pipelines.append(_random_pipeline(f"critic{copy}", home, rng, forward_only=False))
    if rng.random() < 0.3:
        home = list(range(ranks))
        pipelines.append(_random_pipeline("reference", home, rng, forward_only=True))
    latency = float(rng.choice([0.0, 0.1]))
    loose = Problem(ranks, tuple(pipelines), None, latency)
    peak = summarize(serial(loose), split_weight=False, seconds=0.0).peak_memory
    return Problem(ranks, tuple(pipelines), 1.2 * peak, latency)


def _random_pipeline(
    name: str, home: list[int], rng: np.random.Generator, *, forward_only: bool
) -> Pipeline:
    m = int(rng.integers(2, 25))
    forward = rng.uniform(0.5, 2.0) * rng.uniform(0.8, 1.2, len(home))
    backward = 0.0 * forward if forward_only else forward * rng.uniform(1.8, 2.2)
    weights = rng.uniform(0.6, 1.4, m) if rng.random() < 0.5 else np.ones(m)
    return Pipeline.make(
        name,
        home,
        m,
        forward.tolist(),
        backward.tolist(),
        weight=(backward / 2).tolist(),
        activation=float(rng.uniform(0.5, 1.5)),
        microbatch_weights=weights.tolist(),
    )


def _measure(problem: Problem, budget_s: float, split: bool) -> Row:
    start = time.monotonic()
    found = fuse(problem, budget_s=budget_s, split_weight=split)
    seconds = time.monotonic() - start
    check_channels(found)
    told = summarize(found, split_weight=split, seconds=seconds)
    return {
        "split": split,
        "budget_s": budget_s,
        "seconds": round(seconds, 3),
        "makespan": told.makespan,
        "lower_bound": told.lower_bound,
        "gap": told.makespan / told.lower_bound - 1.0,
        "proven_optimal": told.proven_optimal,
        "peak_memory": told.peak_memory,
        "serial_makespan": told.serial_makespan,
    }


def _flexfusion_problem(instance: dict[str, list[dict[str, float]]], cap: float) -> Problem:
    pipelines = tuple(
        Pipeline.make(
            str(p["name"]),
            list(p["stages"]),  # type: ignore[call-overload]
            int(p["microbatches"]),
            p["forward"],
            p["backward"],
            weight=p["backward"] / 2,
            activation=p["activation"],
        )
        for p in instance["pipelines"]
    )
    return Problem(int(str(instance["ranks"])), pipelines, cap)


def _pair(ranks: int, m: int) -> Problem:
    actor = Pipeline.make("actor", range(ranks), m, 1, 2, weight=1)
    critic = Pipeline.make("critic", range(ranks)[::-1], m, 0.5, 1, weight=0.5)
    return Problem(ranks, (actor, critic))


def _simulation_rate(schedule: Schedule) -> float:
    coded, rows = encode_schedule(schedule)
    size, n, ranks = coded.rank.shape[0], rows.tasks.shape[0], coded.num_ranks
    end, order = np.zeros(size), np.zeros(n, np.int64)
    waiter, at = np.zeros(size, np.int64), np.zeros(ranks, np.int64)
    todo = np.zeros(ranks + 1, np.int64)

    def once() -> None:
        run_rows(rows, coded, end, waiter, at, todo, order)

    once()
    return float(n / min(_timed(once) for _ in range(200)))


def _timed(call: Callable[[], None]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _warm() -> None:
    for split in (False, True):
        fuse(_pair(2, 2), iterations=12, split_weight=split)


def _save(output: Path | None, rows: list[Row]) -> None:
    if output is None:
        return
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    record = {
        "hardware": f"{platform.machine()} CPU, one core",
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", "bench/bench_fused_schedule.py", *sys.argv[1:]]),
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
