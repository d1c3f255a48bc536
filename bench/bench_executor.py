"""What the executor loses between the planned and the real schedule.

    python -m bench.bench_executor fidelity --ranks 8 --forward-ms 10
    python -m bench.bench_executor models --microbatches 2 4 8

`fidelity`: schedules of sleeping tasks, so cores do not matter; measured over planned makespan and
the cost of a task. `models`: actor and critic of the quick-start shape on two ranks of one thread
each; serial 1F1B against fused, side by side in one run, beside the ratio predicted from the
measured task times. `..._over_replayed`: measured time over that of an ideal executor whose tasks
take exactly as long as they did: what is lost to messages and bookkeeping.
`cpu_ratio`: serial
over fused by the processor times of the tasks, for machines that others use too. One JSON object
per line.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhfuse.config import (
    ActorConfig,
    Config,
    CriticConfig,
    FusionConfig,
    PlacementConfig,
    TrainerConfig,
)
from rlhfuse.models.partition import partition
from rlhfuse.placement import StagePlacement
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import makespan
from rlhfuse.timeline import Kind, Span
from rlhfuse.training.channels import Channels
from rlhfuse.training.clock import HostClock
from rlhfuse.training.executor import Executor
from rlhfuse.training.records import MiniBatchPlan, SampleData
from rlhfuse.training.update import RankTrainer

Result = TypeVar("Result")
CPU = torch.device("cpu")
TASKS = (Kind.F, Kind.B, Kind.I, Kind.W)


def run_ranks(world_size: int, function: Callable[[int], Result]) -> list[Result]:
    """`function(rank)` in forked processes of one thread, each on a core of its own if possible."""
    context = multiprocessing.get_context("fork")
    ends = [context.Pipe(duplex=False) for _ in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:

        def child(rank: int) -> None:
            torch.set_num_threads(1)
            cores = sorted(os.sched_getaffinity(0))
            if world_size <= len(cores):
                os.sched_setaffinity(0, {cores[rank]})
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meeting",
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=120),
            )
            ends[rank][1].send(function(rank))
            dist.barrier()
            os._exit(0)

        processes = [context.Process(target=child, args=(rank,)) for rank in range(world_size)]
        for process in processes:
            process.start()
        results = [end.recv() for end, _ in ends]
        for process in processes:
            process.join()
    return results


# --- fidelity ------------------------------------------------------------------------------


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


def fidelity(num_ranks: int, forward_s: float, repeats: int, rows: int, split: bool) -> None:
    problem = two_models(num_ranks, 2 * num_ranks, forward_s)
    schedule = fuse(problem, iterations=40, split_weight=split)
    shape = (rows, 256)

    def run(rank: int) -> tuple[list[tuple[float, float]], list[float], list[float]]:
        ranks = {pipe.name: pipe.stages for pipe in problem.pipelines}
        channels = Channels(
            rank, ranks, device=CPU, dtype=torch.float32, timeout=timedelta(seconds=60)
        )
        runners = {
            (name, stages.index(rank)): Sleeper(forward_s, shape) for name, stages in ranks.items()
        }
        executor = Executor(rank, channels, runners, HostClock(), _get_default_store())
        shapes = {name: [shape] * 2 * num_ranks for name in ranks}
        walls, overheads, stretch = [], [], []
        for _ in range(repeats):
            dist.barrier()
            start = time.monotonic()
            spans: list[Span] = []
            executor.run(schedule, shapes, spans)
            walls.append((start, time.monotonic()))
            busy = [span for span in spans if span.kind in TASKS]
            planned_s = {Kind.B: 2 * forward_s}
            stretch += [s.duration_s / planned_s.get(s.kind, forward_s) for s in busy]
            for before, after in itertools.pairwise(busy):
                waited = sum(
                    s.duration_s
                    for s in spans
                    if s.kind is Kind.WAIT and before.end_s <= s.start_s <= after.start_s
                )
                overheads.append(after.start_s - before.end_s - waited)
        return walls, overheads, stretch

    results = run_ranks(num_ranks, run)
    planned = makespan(schedule)
    ratios = [
        (max(r[0][i][1] for r in results) - min(r[0][i][0] for r in results)) / planned
        for i in range(repeats)
    ]
    overheads = sorted(o for result in results for o in result[1])
    row = {
        "bench": "fidelity",
        "ranks": num_ranks,
        "forward_ms": forward_s * 1e3,
        "message_kb": rows,
        "split_weight": split,
        "planned_s": round(planned, 4),
        "measured_over_planned": round(statistics.median(ratios), 4),
        "best_over_planned": round(min(ratios), 4),
        "task_over_planned": round(statistics.mean(x for r in results for x in r[2]), 4),
        "overhead_us_p50": round(statistics.median(overheads) * 1e6, 1),
        "overhead_us_p99": round(overheads[int(0.99 * len(overheads))] * 1e6, 1),
    }
    print(json.dumps(row), flush=True)


# --- real models ---------------------------------------------------------------------------


def save_models(folder: Path, layers: int, width: int, vocabulary: int) -> None:
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
    )
    shape.num_labels = 1
    torch.manual_seed(0)
    LlamaForCausalLM(shape).save_pretrained(folder / "actor")
    LlamaForSequenceClassification(shape).save_pretrained(folder / "critic")


def make_samples(num_tokens: int, vocabulary: int) -> list[SampleData]:
    """Prompts of 16 tokens, responses of 20 to 256, in all about `num_tokens`."""
    rng = np.random.default_rng(0)
    samples: list[SampleData] = []
    total = 0
    while total < num_tokens:
        length = int(np.clip(rng.lognormal(3.7, 0.8), 20, 256))
        total += 16 + length
        floats = [rng.normal(m, 0.1, length).astype(np.float32) for m in (-7, -7, -7, 0)]
        samples.append(
            SampleData(
                sample_id=len(samples),
                group=len(samples),
                prompt=rng.integers(1, vocabulary, 16, dtype=np.int32),
                response=rng.integers(1, vocabulary, length, dtype=np.int32),
                score=float(rng.normal()),
                old_logprobs=floats[0],
                rollout_logprobs=floats[1],
                reference_logprobs=floats[2],
                values=floats[3],
            )
        )
    return samples


def cut(samples: Sequence[SampleData], count: int) -> tuple[tuple[int, ...], ...]:
    """Longest first, into the lightest micro-batch."""
    bins: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for sample in sorted(samples, key=lambda s: -len(s.response)):
        lightest = loads.index(min(loads))
        bins[lightest].append(sample.sample_id)
        loads[lightest] += len(sample.response) + len(sample.prompt)
    return tuple(tuple(sorted(b)) for b in bins)


def problem_of(
    durations: dict[str, float], place: Mapping[str, StagePlacement], count: int
) -> Problem:
    """A problem from mean task times (``actor:0F``)."""
    pipelines = []
    for role, at in place.items():
        stages = range(len(at.ranks))
        weight = [durations.get(f"{role}:{s}W", 0.0) for s in stages]
        if any(weight):
            backward = [durations[f"{role}:{s}I"] + weight[s] for s in stages]
        else:
            backward = [durations[f"{role}:{s}B"] for s in stages]
        forward = [durations[f"{role}:{s}F"] for s in stages]
        pipelines.append(Pipeline.make(role, at.ranks, count, forward, backward, weight=weight))
    return Problem(len(place["actor"].ranks), tuple(pipelines))


def mean_durations(spans: Sequence[Span]) -> dict[str, float]:
    """Median processor time of each kind of task (``actor:0F``)."""
    found: dict[str, list[float]] = {}
    for span in spans:
        if span.kind in TASKS:
            key = f"{span.args['pipeline']}:{span.args['pp_stage']}{span.kind.value}"
            found.setdefault(key, []).append(float(span.args["cpu_s"]))
    return {key: statistics.median(values) for key, values in found.items()}


def replay(schedule: Schedule, spans: Sequence[Span], *, cpu: bool = False) -> float:
    """Makespan of a schedule whose tasks take exactly as long as they did in one run, with free
    messages: what the executor itself loses is the measured time beyond this. `cpu`: as long as
    their processor time, as if nothing else ran on the machine."""
    duration = {
        span.name: float(span.args["cpu_s"]) if cpu else span.duration_s
        for span in spans
        if span.kind in TASKS
    }
    ends: dict[Task, float] = {}
    rows = [list(row) for row in schedule.rows]
    free = [0.0] * len(rows)
    while any(rows):
        for rank, row in enumerate(rows):
            while row:
                source = _input_of(schedule, row[0])
                if source and not any(task in ends for task in source):
                    break
                ready = max((ends[task] for task in source if task in ends), default=0.0)
                task = row.pop(0)
                free[rank] = max(free[rank], ready) + duration[str(task)]
                ends[task] = free[rank]
    return max(free)


def _input_of(schedule: Schedule, task: Task) -> tuple[Task, ...]:
    """The tasks one of which makes the input of `task`."""
    last = schedule.problem.pipeline(task.pipeline).num_stages - 1
    if task.op is Op.F:
        return (replace(task, pp_stage=task.pp_stage - 1),) if task.pp_stage else ()
    if task.op is Op.W or task.pp_stage == last:
        return (replace(task, op=Op.I if task.op is Op.W else Op.F),)
    above = replace(task, pp_stage=task.pp_stage + 1)
    return replace(above, op=Op.B), replace(above, op=Op.I)


@dataclass(frozen=True)
class Runs:
    """One rank's updates: the fused schedule, and per kind (spans, seconds) of every repeat."""

    fused: tuple[Schedule, ...]
    measured: dict[str, list[tuple[list[Span], float]]]


def training_s(results: Sequence[tuple[list[Span], object]]) -> float:
    """From the first task of any rank to the last."""
    spans = [s for result in results for s in result[0] if s.kind in TASKS]
    return max(s.end_s for s in spans) - min(s.start_s for s in spans)


def serial(problem: Problem) -> tuple[Schedule, ...]:
    return tuple(one_f_one_b(replace(problem, pipelines=(p,))) for p in problem.pipelines)


def models(arguments: argparse.Namespace, count: int, folder: Path) -> None:
    samples = make_samples(arguments.tokens * count, arguments.vocabulary)
    place = {
        role: StagePlacement(ranks, layers)
        for role, ranks, layers in (
            ("actor", (0, 1), _layers(arguments.layers, arguments.actor_head)),
            ("critic", (1, 0), _layers(arguments.layers, 0.0)),
        )
    }
    config = Config(
        actor=ActorConfig(path=str(folder / "actor")),
        critic=CriticConfig(path=str(folder / "critic")),
        fusion=FusionConfig(split_weight=arguments.split_weight),
        placement=PlacementConfig(num_devices=2),
        trainer=TrainerConfig(wait_timeout_s=120.0),
    )
    unit = two_models(2, count, 1.0)
    microbatches = {role: cut(samples, count) for role in ("actor", "critic")}

    def run(rank: int) -> Runs:
        trainer = RankTrainer(
            config,
            rank=rank,
            world_size=2,
            pipelines=place,
            device=CPU,
            dtype=torch.float32,
            total_steps=100,
        )

        def update(rounds: tuple[Schedule, ...]) -> tuple[list[Span], float]:
            spans: list[Span] = []
            dist.barrier()
            start = time.monotonic()
            trainer.update(0, samples, [MiniBatchPlan(microbatches, rounds)], 0.05, spans)
            return spans, time.monotonic() - start

        update(serial(unit))
        gathered: list[list[Span]] = [[], []]
        dist.all_gather_object(gathered, update(serial(unit))[0])
        measured = problem_of(mean_durations(gathered[0] + gathered[1]), place, count)
        fused = (fuse(measured, iterations=200),)
        runs = Runs(fused, {"serial": [], "fused": []})
        for _ in range(arguments.repeats):
            runs.measured["serial"].append(update(serial(unit)))
            runs.measured["fused"].append(update(fused))
        return runs

    per_rank = run_ranks(2, run)
    ran = {"serial": serial(unit), "fused": per_rank[0].fused}
    seconds, best, steps, spans, lost, cpu = {}, {}, {}, {}, {}, {}
    for name in ("serial", "fused"):
        pairs = list(zip(*(r.measured[name] for r in per_rank), strict=True))
        lost[name] = statistics.median(
            training_s(pair)
            / sum(replay(s, [x for part in pair for x in part[0]]) for s in ran[name])
            for pair in pairs
        )
        seconds[name] = statistics.median(training_s(pair) for pair in pairs)
        cpu[name] = statistics.median(
            sum(replay(s, [*pair[0][0], *pair[1][0]], cpu=True) for s in ran[name])
            for pair in pairs
        )
        best[name] = min(training_s(pair) for pair in pairs)
        steps[name] = statistics.median(max(part[1] for part in pair) for pair in pairs)
        spans[name] = [s for pair in pairs for part in pair for s in part[0]]
    own = {name: problem_of(mean_durations(spans[name]), place, count) for name in spans}
    predicted_serial = sum(makespan(s) for s in serial(own["serial"]))
    fused = fuse(own["serial"], iterations=200)
    row = {
        "bench": "models",
        "microbatches": count,
        "tokens_per_microbatch": arguments.tokens,
        "serial_s": round(seconds["serial"], 4),
        "fused_s": round(seconds["fused"], 4),
        "ratio": round(seconds["serial"] / seconds["fused"], 3),
        "best_ratio": round(best["serial"] / best["fused"], 3),
        "cpu_ratio": round(cpu["serial"] / cpu["fused"], 3),
        "update_ratio": round(steps["serial"] / steps["fused"], 3),
        "predicted_ratio": round(predicted_serial / makespan(fused), 3),
        "serial_over_predicted": round(seconds["serial"] / predicted_serial, 3),
        "fused_over_predicted": round(seconds["fused"] / makespan(fused), 3),
        "serial_over_replayed": round(lost["serial"], 3),
        "fused_over_replayed": round(lost["fused"], 3),
        "update_serial_s": round(steps["serial"], 4),
        "update_fused_s": round(steps["fused"], 4),
        "task_ms": {
            name: {k: round(v * 1e3, 1) for k, v in sorted(mean_durations(s).items())}
            for name, s in spans.items()
        },
    }
    print(json.dumps(row), flush=True)


def _layers(num_layers: int, head_cost: float) -> tuple[tuple[int, int], ...]:
    cuts = partition(num_layers, 2, layer_cost=1.0, head_cost=head_cost)
    return tuple((part.start, part.stop) for part in cuts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("fidelity")
    one.add_argument("--ranks", type=int, nargs="+", default=[8])
    one.add_argument("--forward-ms", type=float, nargs="+", default=[10.0])
    one.add_argument("--repeats", type=int, default=5)
    one.add_argument("--rows", type=int, default=64, help="rows of 1 KB in a message")
    one.add_argument("--split-weight", action="store_true")
    two = commands.add_parser("models")
    two.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8])
    two.add_argument("--tokens", type=int, default=2000, help="per micro-batch")
    two.add_argument("--layers", type=int, default=4)
    two.add_argument("--width", type=int, default=256)
    two.add_argument("--vocabulary", type=int, default=1024)
    two.add_argument("--actor-head", type=float, default=0.0, help="cost of the head in layers")
    two.add_argument("--repeats", type=int, default=5)
    two.add_argument("--split-weight", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "fidelity":
        for num_ranks in arguments.ranks:
            for milliseconds in arguments.forward_ms:
                fidelity(
                    num_ranks,
                    milliseconds / 1e3,
                    arguments.repeats,
                    arguments.rows,
                    arguments.split_weight,
                )
        return
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), arguments.layers, arguments.width, arguments.vocabulary)
        for count in arguments.microbatches:
            models(arguments, count, Path(folder))


if __name__ == "__main__":
    main()
