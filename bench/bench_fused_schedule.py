"""Fused schedules against lower bounds, FlexFusion's published results and serial baselines.

    python -m bench.bench_fused_schedule flexfusion REFERENCE.json --budget-s 30
    python -m bench.bench_fused_schedule memory REFERENCE.json --budget-s 30
    python -m bench.bench_fused_schedule headline --budget-s 2
    python -m bench.bench_fused_schedule random --count 200
    python -m bench.bench_fused_schedule online --count 20 --rows ROWS.jsonl
    python -m bench.bench_fused_schedule scaling
    python -m bench.bench_fused_schedule speed

The first two need the reference file with the 12 published problems. One core; budgets count
processor seconds, so that other work on the machine does not matter. `--save` writes the result.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import click
import msgspec
import numpy as np

from bench.record import print_table, write_result
from bench.schedule_problems import (
    PublishedPipeline,
    Row,
    flexfusion_problem,
    greedy,
    measure,
    pair,
    random_orders,
    random_problem,
    step_problem,
)
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.compiled import Coded, Rows, run_rows
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.interleaved import interleaved
from rlhfuse.schedules.ir import REL_TOL, Problem, Schedule
from rlhfuse.schedules.standard import serial, zb_h1
from rlhfuse.schedules.timing import makespan, makespans
from rlhfuse.schedules.zero_bubble import zb_v
from rlhfuse.warm_up import warm_up


class Found(msgspec.Struct, frozen=True):
    """What the authors publish for one problem."""

    latency: float
    peak_memory: float


class Instance(msgspec.Struct, frozen=True):
    """One published problem."""

    id: int
    ranks: int
    pipelines: list[PublishedPipeline]
    latency_lower_bound: float
    flexfusion: Found
    serial_zero_bubble_h1: float
    seen_with_weight_split_at_that_peak: float


class Published(msgspec.Struct, frozen=True):
    """The reference file."""

    instances: list[Instance]


SERIAL: tuple[tuple[str, Callable[[Problem], Schedule]], ...] = (
    ("1f1b", serial),
    ("interleaved-2", interleaved),
    ("interleaved-4", lambda problem: interleaved(problem, 4)),
    ("zb-h1", zb_h1),
    ("zb-v", zb_v),
)


@click.group()
def main() -> None:
    """Benchmarks of `rlhfuse.schedules`."""
    warm_up()  # compiling is paid once per installation


reference_file = click.argument("reference", type=click.Path(path_type=Path, exists=True))
ids = click.option("--only", type=int, multiple=True, help="problems (default: all)")
kept_rows = click.option(
    "--rows", "kept", type=click.Path(path_type=Path), help="go on from this file"
)
save = click.option("--save", is_flag=True, help="write bench/results/")


@main.command()
@reference_file
@ids
@click.option("--budget-s", type=float, default=30.0)
@click.option("--split", type=click.Choice(["no", "yes", "both"]), default="both")
@click.option("--seed", type=int, default=0)
@kept_rows
@save
def flexfusion(
    reference: Path,
    only: Sequence[int],
    budget_s: float,
    split: str,
    seed: int,
    kept: Path | None,
    save: bool,
) -> None:
    """The 12 published problems at the authors' best published peak memory."""
    rows = _kept(kept, seed + 1)
    done = {(row["id"], row["split"]) for row in rows}
    modes = {"no": (False,), "yes": (True,), "both": (False, True)}[split]
    for instance in _instances(reference, only):
        theirs = instance.flexfusion
        problem = flexfusion_problem(instance.ranks, instance.pipelines, theirs.peak_memory)
        for mode in modes:
            if (instance.id, int(mode)) in done:
                continue
            row: Row = {"id": instance.id, "seed": seed}
            row |= measure(problem, budget_s, split=mode, seed=seed)
            row |= {
                "cap": theirs.peak_memory,
                "flexfusion": theirs.latency,
                "bound_without_split": instance.latency_lower_bound,
                "seen_with_split": instance.seen_with_weight_split_at_that_peak,
                "serial_zb_h1": instance.serial_zero_bubble_h1,
            }
            rows.append(row)
            _keep(kept, [row])
            click.echo(json.dumps(row))
    rows.sort(key=lambda row: (row["id"], row["split"]))
    _finish(rows, "schedule_flexfusion" + (f"_seed{seed}" if seed else ""), save)


@main.command()
@reference_file
@ids
@click.option("--budget-s", type=float, default=30.0)
@save
def memory(reference: Path, only: Sequence[int], budget_s: float, save: bool) -> None:
    """The lowest peak memory found at the authors' latency, F and B only."""
    rows: list[Row] = []
    for instance in _instances(reference, only):
        theirs = instance.flexfusion
        problem = flexfusion_problem(instance.ranks, instance.pipelines, theirs.peak_memory)
        rows.append({"id": instance.id} | _lowest_peak(problem, theirs.latency, budget_s))
        rows[-1] |= {"flexfusion_peak": theirs.peak_memory}
        click.echo(json.dumps(rows[-1]))
    _finish(rows, "schedule_memory", save)


def _lowest_peak(problem: Problem, latency: float, budget_s: float) -> Row:
    """Lower the cap to just below what was needed, again and again."""
    start, peak, cap = time.process_time(), np.inf, problem.memory_cap
    least = min(min(pipe.activation) for pipe in problem.pipelines)
    while (left := budget_s - (time.process_time() - start)) > 0:
        found = fuse(
            replace(problem, memory_cap=cap),
            budget_s=left,
            target=latency,
            clock=time.process_time,
        )
        if makespan(found) > latency * (1 + REL_TOL):
            break
        peak = max(peak_memory(found))
        cap = peak - 0.02 * least
    seconds = round(time.process_time() - start, 2)
    told = float(peak) if peak < np.inf else "latency not reached"
    return {"latency": latency, "peak_memory": told, "cpu_s": seconds}


@main.command()
@click.option("--budget-s", type=float, default=2.0)
@save
def headline(budget_s: float, save: bool) -> None:
    """Against every serial schedule, at that schedule's own peak memory."""
    rows: list[Row] = []
    for ranks in (8, 16):
        for m in (8, 16, 32):
            problem = pair(ranks, m)
            for name, make in SERIAL:
                try:
                    theirs = make(problem)
                    theirs.validate()
                except ValueError as error:
                    click.echo(f"{ranks} ranks, {m} micro-batches, {name}: {error}".split("\n")[0])
                    continue
                row: Row = {"ranks": ranks, "microbatches": m, "serial": name}
                row |= {"serial_makespan": makespan(theirs), "peak": max(peak_memory(theirs))}
                at_that = replace(problem, memory_cap=max(peak_memory(theirs)))
                for split in (False, True):
                    ours = measure(at_that, budget_s, split=split)
                    word = "split" if split else "whole"
                    row[word] = ours["makespan"]
                    row[f"bound_{word}"] = ours["lower_bound"]
                    row[f"speedup_{word}"] = makespan(theirs) / float(ours["makespan"])
                rows.append(row)
    _finish(rows, "schedule_headline", save)


@main.command(name="random")
@click.option("--budget-s", type=float, multiple=True, default=(0.05, 1.0, 10.0))
@click.option("--count", type=int, default=200)
@click.option("--long-count", type=int, help="problems for budgets over 1 s (default: all)")
@kept_rows
@save
def random_problems(
    budget_s: tuple[float, ...], count: int, long_count: int | None, kept: Path | None, save: bool
) -> None:
    """Random problems, seeds 0 to count - 1: gap to the bound, and against plain schedules."""
    rows = _kept(kept, count)
    done = {(row["seed"], row["split"], row["budget_s"]) for row in rows}
    for seed in range(count):
        wanted = [b for b in budget_s if b <= 1.0 or long_count is None or seed < long_count]
        for split in (False, True):
            left = [budget for budget in wanted if (seed, int(split), budget) not in done]
            found = _random_rows(seed, split, left)
            rows += found
            _keep(kept, found)
    summary: list[Row] = []
    for mode in (0, 1):
        for budget in budget_s:
            chosen = [r for r in rows if r["split"] == mode and r["budget_s"] == budget]
            head: Row = {"split": mode, "budget_s": budget}
            summary.append(head | _gaps(chosen))
    _finish([*summary, *rows] if save else summary, "schedule_random", save, show=summary)


def _kept(path: Path | None, count: int) -> list[Row]:
    """What an earlier run wrote, of problems 0 to count - 1."""
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return [row for row in map(json.loads, lines) if row["seed"] < count]


def _keep(path: Path | None, rows: Sequence[Row]) -> None:
    if path is not None:
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def _random_rows(seed: int, split: bool, budgets: Sequence[float]) -> list[Row]:
    if not budgets:
        return []
    problem = random_problem(seed)
    plain: Row = {
        "seed": seed,
        "serial_1f1b": makespan(serial(problem)),
        "serial_zb_h1": makespan(zb_h1(problem)),
        "greedy": makespan(greedy(problem, split=split)),
    }
    return [plain | measure(problem, budget, split=split) for budget in budgets]


def _gaps(rows: Sequence[Row]) -> Row:
    """Mean and worst gap to the bound, and mean speed-ups over plain schedules."""
    gaps = [float(r["gap"]) for r in rows]
    summary: Row = {
        "mean_gap": statistics.fmean(gaps),
        "worst_gap": max(gaps),
        "at_bound": sum(int(r["proven_optimal"]) for r in rows),
        "problems": len(rows),
    }
    for name in ("serial_1f1b", "serial_zb_h1", "greedy"):
        ratios = [float(r[name]) / float(r["makespan"]) for r in rows]
        summary[f"over_{name}"] = statistics.fmean(ratios)
        summary[f"least_over_{name}"] = min(ratios)
    return summary


@main.command()
@click.option("--count", type=int, default=20)
@click.option("--long-s", type=float, default=30.0)
@kept_rows
@save
def online(count: int, long_s: float, kept: Path | None, save: bool) -> None:
    """50 ms of one core against a long search, on problems up to 16 ranks and 64."""
    rows = _kept(kept, count)
    done = {(row["seed"], row["split"]) for row in rows}
    for seed in range(count):
        problem = step_problem(seed)
        for split in (False, True):
            if (seed, int(split)) in done:
                continue
            start = time.process_time()
            quick = fuse(problem, budget_s=0.05, split_weight=split, clock=time.process_time)
            cpu = time.process_time() - start
            long = measure(problem, long_s, split=split)
            row: Row = {"seed": seed, "split": int(split), "cpu_s": cpu}
            row |= {"makespan": makespan(quick), "long": long["makespan"]}
            row["over_long"] = makespan(quick) / float(long["makespan"]) - 1.0
            row["serial_over_quick"] = makespan(serial(problem)) / makespan(quick)
            rows.append(row)
            _keep(kept, [row])
            click.echo(json.dumps(row))
    over = [float(r["over_long"]) for r in rows]
    click.echo(f"mean {statistics.fmean(over):.4f}, worst {max(over):.4f} over the long search")
    _finish(rows, "schedule_online", save)


@main.command()
@click.option("--budget-s", type=float, default=10.0)
@save
def scaling(budget_s: float, save: bool) -> None:
    """How cost grows: ranks to 64, micro-batches to 512."""
    rows: list[Row] = []
    for ranks, m in ((8, 32), (8, 128), (8, 512), (16, 64), (32, 64), (64, 64), (64, 128)):
        problem = replace(pair(ranks, m), memory_cap=1.5 * ranks)
        for split in (False, True):
            tasks = 2 * ranks * m * (3 if split else 2)
            row: Row = {"ranks": ranks, "microbatches": m, "tasks": tasks}
            rows.append(row | measure(problem, budget_s, split=split))
            click.echo(json.dumps(rows[-1]))
    _finish(rows, "schedule_scaling", save)


@main.command()
@save
def speed(save: bool) -> None:
    """Simulated tasks per second, one core: a call for many schedules, and a call for each."""
    rows: list[Row] = []
    for ranks, m in ((4, 8), (8, 32), (16, 64), (64, 256)):
        problem = pair(ranks, m)
        count = max(4, 100_000 // (4 * ranks * m))
        coded, one, orders = random_orders(problem, count)
        together = _best_of(lambda: makespans(coded, one.first, orders)) / orders.size  # noqa: B023
        row: Row = {"ranks": ranks, "microbatches": m, "schedules_a_call": count}
        row["million_tasks_per_s"] = 1e-6 / together
        row["one_schedule_a_call"] = 1e-6 / (_alone(coded, one) / one.tasks.shape[0])
        rows.append(row)
    _finish(rows, "schedule_speed", save)


def _alone(coded: Coded, rows: Rows) -> float:
    """Seconds that one schedule takes in a call of its own."""
    size, n, ranks = coded.rank.shape[0], rows.tasks.shape[0], coded.num_ranks
    end, order = np.zeros(size), np.zeros(n, np.int64)
    waiter, at = np.zeros(size, np.int64), np.zeros(ranks, np.int64)
    todo = np.zeros(ranks + 1, np.int64)
    return _best_of(lambda: run_rows(rows, coded, end, waiter, at, todo, order))


def _best_of(call: Callable[[], object], repeats: int = 100) -> float:
    """Least seconds of a call; the first, which loads compiled code, does not count."""
    call()
    best = np.inf
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def _instances(reference: Path, only: Sequence[int]) -> list[Instance]:
    instances = msgspec.json.decode(reference.read_bytes(), type=Published).instances
    return [i for i in instances if not only or i.id in only]


def _finish(rows: Sequence[Row], name: str, save: bool, show: Sequence[Row] | None = None) -> None:
    print_table(show if show is not None else rows)
    if save:
        click.echo(str(write_result(name, rows)))


if __name__ == "__main__":
    main()
