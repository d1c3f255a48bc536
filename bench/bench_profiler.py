"""The profiler, measured: a real run against theory, known causes found again, speed.

Run: ``python bench/bench_profiler.py [--events N]``. Prints three tables; every figure is of the
machine it runs on.
"""

import argparse
import json
import random
import resource
import tempfile
import time
from pathlib import Path

from rlhfuse.profiler.attribution import attribute
from rlhfuse.profiler.clocks import align
from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import simulate
from rlhfuse.timeline import Timeline

PRIMUS = Path(__file__).parents[1] / "tests/profiler/data/primus_pp8"


def primus() -> None:
    """Idle share of a real pp=8 run beside theory and beside the run's own totals."""
    trace = open_trace([PRIMUS])
    print("Primus pp=8, 16 micro-batches: theory (p-1)/(m+p-1) = 30.4 %")
    print(f"{'step':>6}{'wall s':>10}{'bubble':>9}{'replay/measured':>17}{'critic fused':>14}")
    for step in (2, 10, 20):
        _, summary = explain(trace, step)
        by_name = {what.name: what for what in summary.what_if}
        replayed = by_name["as it ran, replayed"].makespan_s / summary.wall_s
        fused = next(w for n, w in by_name.items() if n.startswith("fused with a critic"))
        print(
            f"{step:>6}{summary.wall_s:>10.3f}{summary.bubble_fraction:>9.1%}{replayed:>17.4f}"
            f"{fused.saving_fraction:>14.1%}"
        )


def synthetic() -> None:
    """Skewed and jittered timelines: errors of clocks (of a task) and of causes (of wall time)."""
    print("\nKnown causes; clocks up to 200 ms, micro-batches 10 % apart, messages equally long")
    print(f"{'pp':>4}{'m':>5}{'clock error / task':>20}{'largest cause error / wall':>28}")
    for ranks, mbs in ((2, 4), (4, 8), (8, 16), (16, 32)):
        rng = random.Random(ranks)
        weights = [rng.uniform(0.9, 1.1) for _ in range(mbs)]
        pipe = Pipeline.make("m", list(range(ranks)), mbs, 0.01, 0.02, microbatch_weights=weights)
        truth = simulate(one_f_one_b(Problem(ranks, (pipe,), link_latency=5e-4)))
        skews = {lane: rng.uniform(-0.2, 0.2) for lane in truth.lanes}
        skewed = [Timeline(truth.of_lane(x)).shifted(skews[x]) for x in truth.lanes]
        found = align(Timeline.merged(skewed))
        clock = max(
            abs(found.offsets_s[x] - (skews["rank0"] - skews[x])) / 0.01 for x in truth.lanes
        )
        before, after = attribute(truth), attribute(found.timeline)
        error = max(
            abs(after.causes.get(cause, 0.0) - seconds) / (before.wall_s * ranks)
            for cause, seconds in before.causes.items()
        )
        print(f"{ranks:>4}{mbs:>5}{clock:>20.2%}{error:>28.2%}")


def speed(events: int) -> None:
    """A made-up PyTorch trace of `events` events, a third of them kernels."""
    rng = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank0.json"
        with path.open("w") as file:
            file.write('{"schemaVersion": 1, "traceEvents": [')
            now = 1.7e15
            for n in range(events // 3):
                now += rng.uniform(1, 30)
                shared = {"ph": "X", "pid": 1, "tid": 2, "dur": rng.uniform(1, 14), "ts": now}
                args = {"External id": n, "Input Dims": [[2048, 1], [1, 4096]], "correlation": n}
                rows = [
                    {**shared, "cat": cat, "name": name, "args": args}
                    for cat, name in (
                        ("cpu_op", "aten::mm"),
                        ("cuda_runtime", "cudaLaunchKernel"),
                        ("kernel", f"gemm_{n % 40}"),
                    )
                ]
                text = ",\n".join(json.dumps(row) for row in rows)
                file.write(text if n == 0 else ",\n" + text)
            file.write("]}")
        began = time.perf_counter()
        trace = open_trace([path])
        explain(trace, None)
        took = time.perf_counter() - began
        size = path.stat().st_size / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"\nPyTorch trace of {size:.0f} MB, {events} events: {took:.1f} s, peak {peak:.0f} MiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--events", type=int, default=600_000)
    arguments = parser.parse_args()
    primus()
    synthetic()
    speed(arguments.events)


if __name__ == "__main__":
    main()
