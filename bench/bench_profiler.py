"""The profiler, measured: a real run against theory, known causes found again, HTA, size, overhead.

    python -m bench.bench_profiler truth|primus|large|label|fused
    python -m bench.bench_profiler hta --python OTHER_VENV/bin/python

What is heavy is imported where it is used: a child's peak memory counts from its parent's.

`hta` compares with HolisticTraceAnalysis, installed in an environment of its own.
"""

import argparse
import contextlib
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench.profiler_truth import FORWARD_S, disturbed, make
from bench.record import Row, print_table, spread, write_result
from rlhfuse.profiler.causes import Cause
from rlhfuse.profiler.clocks import align
from rlhfuse.profiler.explain import explain
from rlhfuse.profiler.readers.detect import open_trace
from rlhfuse.profiler.stages import EARLY, MOVED
from rlhfuse.profiler.summary import ProfileSummary
from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import Timeline

if TYPE_CHECKING:
    from rlhfuse.session import Session

Shares = dict[str, float]  # of device time, by cause
DATA = Path(__file__).parents[1] / "tests/profiler/data"


def primus() -> list[Row]:
    """Idle share of a real pp=8 run beside theory and beside the run's own totals."""
    trace = open_trace([DATA / "primus_pp8"])
    rows: list[Row] = []
    for step in (2, 10, 20):
        _, summary = explain(trace, step)
        by_name = {what.name: what for what in summary.what_if}
        fused = next(w for n, w in by_name.items() if n.startswith("fused with a critic"))
        file = json.loads((DATA / "primus_pp8/pp_rank_0.json").read_text())
        assert summary.bubble_fraction is not None
        rows.append(
            {
                "step": step,
                "wall_s": summary.wall_s,
                "own_total_s": file[str(step)]["total"] / 1e3,
                "idle": summary.bubble_fraction,
                "idle_least_rank": min(r.idle_s / r.wall_s for r in summary.per_rank),
                "idle_most_rank": max(r.idle_s / r.wall_s for r in summary.per_rank),
                "theory": 7 / 23,
                "replay_over_measured": by_name["as it ran, replayed"].makespan_s / summary.wall_s,
                "saved_by_fusing_a_critic": fused.saving_fraction,
            }
        )
    return rows


def truth() -> list[Row]:
    """Jitter, skew and drift: errors of clocks (of a forward task) and of causes (of the wall).

    Replicas that meet once, at the end of the step, cannot tell how their clocks drift apart
    before; with `gathers` they meet at its start as well.
    """
    rows: list[Row] = []
    for ranks in (2, 4, 8, 16):
        for replicas, gathers in ((1, False), (2, False), (2, True), (4, False), (4, True)):
            clock_errors, cause_errors = [], []
            for seed in range(3):
                rng = random.Random(1000 * ranks + 10 * replicas + seed)
                real = make(ranks, replicas, 4 * ranks, rng, gathers=gathers)
                shown, clocks = disturbed(real, rng)
                _, summary = explain(_made(Loaded(shown)), None, critic_scale=None)
                clock_errors.append(_clock_error(shown, clocks))
                for row in summary.per_rank:
                    expected = real.causes[f"rank{row.rank}"]
                    cause_errors += [
                        abs(row.causes.get(c.value, 0.0) - expected.get(c, 0.0)) / real.wall_s
                        for c in Cause
                    ]
            rows.append(
                {
                    "pp": ranks,
                    "dp": replicas,
                    "gathers": gathers,
                    "microbatches": 4 * ranks,
                    "clock_error_of_task": max(clock_errors),
                    "largest_cause_error_of_wall": max(cause_errors),
                }
            )
    return rows


def _made(loaded: Loaded) -> Trace:
    return Trace("made", (), lambda step: loaded)


def _clock_error(shown: Timeline, clocks: dict[str, tuple[float, float]]) -> float:
    """Largest difference between any two aligned clocks, at the step's start and in its middle."""
    found = align(shown)
    worst = 0.0
    lanes = sorted(clocks, key=lambda lane: int(lane[4:]))
    for moment in (0.0, shown.wall_s / 2):
        errors = []
        for lane in lanes:
            offset, rate = clocks[lane]
            reads = moment + offset + rate * moment
            shift = found.offsets_s.get(lane, 0.0)
            shift += found.drifts.get(lane, 0.0) * (reads - shown.start_s)
            errors.append(reads + shift - moment)
        worst = max(worst, max(errors) - min(errors))
    return worst / FORWARD_S


def large(megabytes: int) -> list[Row]:
    """A made-up PyTorch trace: seconds and peak memory of reading and explaining it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rank0.json"
        events = _write_trace(path, megabytes * 10**6)
        command = [sys.executable, "-m", "rlhfuse.cli.main", "profile", str(path), "--json"]
        began = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - began
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    summary = json.loads(done.stdout)
    row: dict[str, float | int | str]
    row = {"megabytes": megabytes, "events": events, "seconds": seconds}
    row |= {"cpu_s": used.ru_utime + used.ru_stime, "peak_mib": used.ru_maxrss / 1024}
    return [row | {"busy_s": summary["per_rank"][0]["compute_s"]}]


def _write_trace(path: Path, size: int) -> int:
    """Operators, launches and kernels as PyTorch's profiler writes them; how many events."""
    rng, now, number = random.Random(1), 1.7e15, 0
    with path.open("w") as file:
        info = '{"backend": "nccl", "rank": 0, "world_size": 1}'
        file.write(f'{{"schemaVersion": 1, "distributedInfo": {info},\n"traceEvents": [\n')
        while file.tell() < size:
            rows = []
            for _ in range(2000):
                now, number = now + rng.uniform(1, 30), number + 1
                ts, dur = round(now, 3), round(rng.uniform(1, 14), 3)
                for cat, name, at, more in (
                    ("cpu_op", "aten::mm", ts, '"Input Dims": [[2048, 1], [1, 4096]]'),
                    ("cuda_runtime", "cudaLaunchKernel", ts, f'"correlation": {number}'),
                    (
                        "kernel",
                        f"gemm_kernel_{number % 40}",
                        ts + 4,
                        f'"stream": 7, "correlation": {number}, "grid": [16, 1, 1]',
                    ),
                ):
                    rows.append(
                        f'  {{\n    "ph": "X", "cat": "{cat}", "name": "{name}", "pid": 71, '
                        f'"tid": 71,\n    "ts": {at:.3f}, "dur": {dur},\n    "args": {{\n      '
                        f'"External id": {number}, {more}\n    }}\n  }}'
                    )
            file.write((",\n" if number > 2000 else "") + ",\n".join(rows))
        file.write('\n],\n"displayTimeUnit": "ms"}\n')
    return 3 * number


HTA = """
import contextlib, io, json, logging, resource, sys, time
logging.disable(logging.CRITICAL)
began = time.perf_counter()
from hta.trace_analysis import TraceAnalysis
loaded = time.perf_counter()
with contextlib.redirect_stdout(io.StringIO()):
    analysis = TraceAnalysis(trace_dir=sys.argv[1], include_last_profiler_step=True)
    table = analysis.get_temporal_breakdown(visualize=False)
done = time.perf_counter()
rows = table[["rank", "idle_time(us)", "compute_time(us)", "kernel_time(us)"]].values.tolist()
kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
peak = sum(resource.getrusage(kind).ru_maxrss for kind in kinds) / 1024
print(json.dumps([rows, loaded - began, done - loaded, peak]))
"""
OURS = """
import json, resource, sys, time
from pathlib import Path
began = time.perf_counter()
from rlhfuse.profiler.attribution import attribute
from rlhfuse.profiler.causes import IDLE, WORK, Cause
from rlhfuse.profiler.readers.detect import open_trace
loaded = time.perf_counter()
found = attribute(open_trace([Path(sys.argv[1])]).load(None).timeline)
done = time.perf_counter()
rows = []
for lane in found.lanes:
    outside = lane.causes.get(Cause.CONTROLLER, 0.0)  # before its first and after its last kernel
    idle = sum(lane.causes.get(cause, 0.0) for cause in IDLE) - outside
    compute = sum(lane.causes.get(cause, 0.0) for cause in WORK)
    rows.append([int(lane.lane[4:]), 1e6 * idle, 1e6 * compute, 1e6 * (lane.wall_s - outside)])
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(json.dumps([rows, loaded - began, done - loaded, peak]))
"""


def hta(python: str, repeats: int) -> list[Row]:
    """Idle, computing and kernel time of both tools; medians of their seconds."""
    folder = str(DATA / "kineto_recsys")
    results = {"hta": (python, HTA), "rlhfuse": (sys.executable, OURS)}
    rows: list[Row] = []
    for tool, (program, code) in results.items():
        runs = []
        for _ in range(repeats):
            began = time.perf_counter()
            done = subprocess.run(
                [program, "-c", code, folder], capture_output=True, text=True, check=True
            )
            runs.append((json.loads(done.stdout), time.perf_counter() - began))
        analysis = spread([run[2] for run, _ in runs])[0]
        whole = spread([seconds for _, seconds in runs])[0]
        for rank, idle, compute, kernels in runs[0][0][0]:
            rows.append(
                {
                    "tool": tool,
                    "rank": int(rank),
                    "idle_us": float(idle),
                    "busy_us": float(kernels - idle),
                    "compute_us": float(compute),
                    "analysis_s": analysis,
                    "with_start_s": whole,
                    "peak_mib": max(run[3] for run, _ in runs),
                }
            )
    return rows


def label(labels: int) -> list[Row]:
    """What a label of `rlhfuse.profiler.record` costs, on this machine's devices."""
    import torch

    from rlhfuse.profiler.record import record

    rows: list[Row] = []
    names = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for name in names:
        with (
            tempfile.TemporaryDirectory() as folder,
            record(Path(folder), rank=0, stage=0, device=torch.device(name)) as recorder,
            recorder.step(1),
        ):
            times = []
            for microbatch in range(labels):
                began = time.perf_counter()
                with recorder.task("F", microbatch):
                    pass
                times.append((time.perf_counter() - began) * 1e6)
        median, least, _ = spread(times)
        rows.append({"device": name, "labels": labels, "median_us": median, "least_us": least})
    return rows


def fused(config_file: str, steps: int, repeats: int) -> list[Row]:
    """The fused step predicted from a serial one, beside the fused step that was then measured;
    then where the device time of both went."""
    import msgspec

    from bench.ranks import say
    from rlhfuse.config_file import load
    from rlhfuse.resolve import resolve
    from rlhfuse.session import open_session
    from rlhfuse.trainer import Trainer

    rows: list[Row] = []
    causes: list[tuple[Shares, Shares]] = []
    config = load(config_file)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        trainer_config = msgspec.structs.replace(
            config.trainer, default_local_dir=folder, total_training_steps=steps, logger=("jsonl",)
        )
        run = resolve(msgspec.structs.replace(config, trainer=trainer_config))
        session = stack.enter_context(open_session(run, resume=False))
        start = Trainer(session).save()
        for _ in range(repeats):
            serial, serial_causes = _last_step(session, start, steps, fused=False)
            measured, fused_causes = _last_step(session, start, steps, fused=True)
            rows.append(_predicted(serial, measured))
            causes.append((serial_causes, fused_causes))
            say(str(rows[-1]))
    return [*rows, *_by_cause(causes)]


def _last_step(session: "Session", start: Path, steps: int, *, fused: bool) -> tuple[Row, Shares]:
    """What the last of `steps` steps took, and the share of device time of each cause; the first
    ones teach the cost model."""
    from bench.processor_time import used
    from bench.ranks import say
    from rlhfuse.run_what_if import simulated_what_if
    from rlhfuse.trainer import Fusions, Trainer

    session.load(start)
    trainer = Trainer(session, Fusions(inter_stage=fused, intra_stage=fused))
    trainer.sync_weights()
    for _ in range(steps - 1):
        trainer.step()
    before = used()
    last = trainer.step()
    row: Row = {
        "step_s": last.metrics["timing_s/step"],
        "others_share": used().others_share(before),
    }
    trace = open_trace([session.folder.timeline(last.step)])
    summary = explain(trace, trace.steps[-1])[1]
    if not fused:
        predicted, told = simulated_what_if(session.folder.path, last.step)
        say(told)
        row = {**row, **_ranges(summary), "predicted_s": predicted.makespan_s}
    total_s = sum(summary.causes.values())
    return row, {cause: seconds / total_s for cause, seconds in summary.causes.items()}


def _by_cause(repeats: list[tuple[Shares, Shares]]) -> list[Row]:
    """Medians of the shares, largest in the serial step first."""

    def median(which: int, cause: str) -> float:
        return statistics.median(pair[which].get(cause, 0.0) for pair in repeats)

    names = {cause for pair in repeats for shares in pair for cause in shares}
    rows: list[Row] = [
        {"cause": name, "serial_share": median(0, name), "fused_share": median(1, name)}
        for name in sorted(names, key=lambda name: -median(0, name))
    ]
    return [row for row in rows if row["serial_share"] or row["fused_share"]]


def _ranges(serial: ProfileSummary) -> Row:
    """What `rlhfuse profile` says without the run's configuration: from its arithmetic."""
    saved = {what.name: serial.wall_s - what.makespan_s for what in serial.what_if}
    training = next(s for name, s in saved.items() if name.startswith("both models fused"))
    cases = [saved.get(name, 0.0) for name in (EARLY, MOVED)]
    return {"least_saved_s": training + min(cases), "most_saved_s": training + max(cases)}


def _predicted(serial: Row, measured: Row) -> Row:
    serial_s, fused_s = float(serial["step_s"]), float(measured["step_s"])
    predicted_s = float(serial["predicted_s"])
    return {
        "serial_s": serial_s,
        "predicted_s": predicted_s,
        "fused_s": fused_s,
        "predicted_over_fused": predicted_s / fused_s,
        "arithmetic_least_s": serial_s - float(serial["most_saved_s"]),
        "arithmetic_most_s": serial_s - float(serial["least_saved_s"]),
        "others_share_serial": serial["others_share"],
        "others_share_fused": measured["others_share"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["truth", "primus", "large", "hta", "label", "fused"])
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--steps", type=int, default=2, help="up to the one that is measured")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--python", default=sys.executable, help="of an environment with HTA")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    rows: list[Row]
    match arguments.what:
        case "truth":
            rows = truth()
        case "primus":
            rows = primus()
        case "large":
            rows = large(arguments.megabytes)
        case "hta":
            rows = hta(arguments.python, arguments.repeats)
        case "label":
            rows = label(2000)
        case _:
            rows = fused(arguments.config, arguments.steps, arguments.repeats)
    print_table(rows)
    print(write_result(f"profiler_{arguments.what}", rows))


if __name__ == "__main__":
    main()
