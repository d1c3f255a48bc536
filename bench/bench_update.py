"""How much faster is an update fused than serial, on real models, and is it as fast as predicted?

    python -m bench.bench_update --microbatches 2 4 8
    python -m bench.bench_update --equal-memory --microbatches 2 4 8 --name bench_update_memory

Actor and critic of the quick-start shape on two ranks of one thread each; serial 1F1B and ZB-H1
(one model after the other), fused, and fused with the weight gradient split off, in turn in one
run. `predicted` is the ratio by the schedules' timing with the measured task times; `replayed` is
measured time over that of an ideal executor whose tasks take exactly as long as they did: what
messages and bookkeeping cost. `peak_over_model`: bytes that autograd (and what waits for W) held
at most over those of the schedule's memory model, which holds a micro-batch whole up to W. All
counts cut the same tokens, so `over_best_serial` compares with serial 1F1B at its own best number
of micro-batches.
`--equal-memory`: the best serial schedules that the search finds within the memory of fused with W
(the weight gradient split off in both), and fused with W within the memory of serial 1F1B;
`model_peak` is the most of any rank, in activations of one micro-batch.
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from bench.held_bytes import HeldBytes
from bench.ideal_executor import TASKS, replay
from bench.ranks import Turns, run_ranks, say
from bench.record import Row, print_table, write_result
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
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule
from rlhfuse.schedules.standard import one_f_one_b, zb_h1
from rlhfuse.schedules.timing import makespan
from rlhfuse.timeline import Span
from rlhfuse.training.records import MiniBatchPlan, SampleData
from rlhfuse.training.stage_runner import AutogradRunner
from rlhfuse.training.torch_backend import TorchBackend
from rlhfuse.training.update import RankTrainer

CPU = torch.device("cpu")
PLACES = {"actor": (0, 1), "critic": (1, 0)}
LAYERS = 4


def save_models(folder: Path, width: int, vocabulary: int) -> None:
    """Random actor and critic below `folder`."""
    shape = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=LAYERS,
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


def mean_durations(spans: Sequence[Span]) -> dict[str, float]:
    """Median processor time of each kind of task (``actor:0F``)."""
    found: dict[str, list[float]] = {}
    for span in spans:
        if span.kind in TASKS:
            key = f"{span.args['pipeline']}:{span.args['pp_stage']}{span.kind.value}"
            found.setdefault(key, []).append(float(span.args["cpu_s"]))
    return {key: statistics.median(values) for key, values in found.items()}


def problem_of(durations: Mapping[str, float], count: int, *, split: bool) -> Problem:
    """The two models with these task times; backward passes cut in two, or whole."""
    pipelines = []
    for role, ranks in PLACES.items():
        weight = [durations[f"{role}:{s}W"] if split else 0.0 for s in range(2)]
        whole = "I" if split else "B"
        backward = [durations[f"{role}:{s}{whole}"] + weight[s] for s in range(2)]
        forward = [durations[f"{role}:{s}F"] for s in range(2)]
        pipelines.append(Pipeline.make(role, ranks, count, forward, backward, weight=weight))
    return Problem(2, tuple(pipelines))


def variants(durations: Mapping[str, float], count: int) -> dict[str, tuple[Schedule, ...]]:
    """What is compared: the rounds of one mini-batch each."""
    whole, split = (problem_of(durations, count, split=s) for s in (False, True))
    return {
        "serial 1F1B": tuple(one_f_one_b(p) for p in alone(whole)),
        "serial ZB-H1": tuple(zb_h1(p) for p in alone(split)),
        "fused": (fuse(whole, iterations=400),),
        "fused with W": (fuse(split, iterations=400, split_weight=True),),
    }


def at_equal_memory(durations: Mapping[str, float], count: int) -> dict[str, tuple[Schedule, ...]]:
    """As `variants`: fused against serial with the same room for activations, both searched."""
    whole, split = (problem_of(durations, count, split=s) for s in (False, True))

    def searched(problem: Problem, cap: float | None) -> Schedule:
        return fuse(problem, memory_cap=cap, iterations=400, split_weight=True)

    plain = tuple(one_f_one_b(p) for p in alone(whole))
    free = searched(split, None)
    return {
        "serial 1F1B": plain,
        "serial, memory of fused with W": tuple(
            searched(p, max(peak_memory(free))) for p in alone(split)
        ),
        "fused with W": (free,),
        "serial, memory of 1F1B": tuple(searched(p, model_peak(plain)) for p in alone(split)),
        "fused with W, memory of 1F1B": (searched(split, model_peak(plain)),),
    }


def alone(problem: Problem) -> list[Problem]:
    """Each model for itself."""
    return [replace(problem, pipelines=(p,)) for p in problem.pipelines]


def model_peak(rounds: Sequence[Schedule]) -> float:
    """The most that the memory model counts on any rank, in any round."""
    return max(max(peak_memory(schedule)) for schedule in rounds)


@dataclass(frozen=True)
class Measured:
    """One rank: per variant what ran, the spans of every repeat, and the peak of held bytes."""

    rounds: dict[str, tuple[Schedule, ...]]
    spans: dict[str, list[list[Span]]]
    peak: dict[str, int]
    alone: dict[str, int]  # bytes held for one micro-batch of all samples, by role


def measure(asked: argparse.Namespace, count: int, folder: Path) -> list[Measured]:
    """Every variant in turn, up to `repeats` times, on two ranks."""
    say(f"{count} micro-batches of each model")
    samples = make_samples(asked.tokens, asked.vocabulary)
    layers = tuple((p.start, p.stop) for p in partition(LAYERS, 2, layer_cost=1.0))
    config = Config(
        actor=ActorConfig(path=str(folder / "actor")),
        critic=CriticConfig(path=str(folder / "critic")),
        fusion=FusionConfig(split_weight=True),
        placement=PlacementConfig(num_devices=2),
        trainer=TrainerConfig(wait_timeout_s=120.0),
    )
    cuts = {role: cut(samples, count) for role in PLACES}

    def run(rank: int) -> Measured:
        runners: list[AutogradRunner] = []

        def backend(*given: Config, **more: Any) -> TorchBackend:
            made = TorchBackend(*given, **more)
            runners.extend(r for r in made.runners.values() if isinstance(r, AutogradRunner))
            return made

        trainer = RankTrainer(
            config,
            rank=rank,
            world_size=2,
            pipelines={role: StagePlacement(ranks, layers) for role, ranks in PLACES.items()},
            device=CPU,
            dtype=torch.float32,
            total_steps=1000,
            make_backend=backend,
        )

        def update(plan: MiniBatchPlan) -> list[Span]:
            spans: list[Span] = []
            dist.barrier()
            trainer.update(0, samples, [plan], 0.05, spans)
            return spans

        unit = {f"{role}:{s}{op}": 1.0 for role in PLACES for s in range(2) for op in "FBIW"}
        seen: list[Span] = []
        for rounds in list(variants(unit, count).values())[:2]:
            update(MiniBatchPlan(cuts, rounds))
            everyone: list[list[Span]] = [[], []]
            dist.all_gather_object(everyone, update(MiniBatchPlan(cuts, rounds)))
            seen += everyone[0] + everyone[1]
        make = at_equal_memory if asked.equal_memory else variants
        compared = make(mean_durations(seen), count)
        found: dict[str, list[list[Span]]] = {name: [] for name in compared}
        turns = Turns(asked.repeats, asked.limit_s / len(asked.microbatches))
        while turns.another(rank):
            for name, rounds in compared.items():
                found[name].append(update(MiniBatchPlan(cuts, rounds)))
        parameters = [t for role in PLACES for t in trainer.named_tensors(role).values()]

        def held(plan: MiniBatchPlan) -> int:
            counter = HeldBytes(parameters, lambda: sum(r.deferred_bytes for r in runners))
            with counter.watch():
                update(plan)
            return counter.peak

        whole = cut(samples, 1)
        rounds = variants(unit, 1)["serial 1F1B"]
        return Measured(
            compared,
            found,
            {name: held(MiniBatchPlan(cuts, rounds)) for name, rounds in compared.items()},
            {
                role: held(MiniBatchPlan({role: whole}, (rounds[i],)))
                for i, role in enumerate(PLACES)
            },
        )

    return run_ranks(2, run)


def row_of(name: str, count: int, results: Sequence[Measured]) -> dict[str, float | int | str]:
    """Medians of one variant; what its schedule promises with the task times it had."""
    repeats = list(zip(*(r.spans[name] for r in results), strict=True))
    rounds = results[0].rounds[name]
    durations = mean_durations([span for parts in repeats for part in parts for span in part])
    split = any(task.op is Op.W for schedule in rounds for row in schedule.rows for task in row)
    problem = problem_of(durations, count, split=split)
    seconds = [training_s(parts) for parts in repeats]
    replayed = [
        training_s(parts) / sum(replay(s, [x for part in parts for x in part]) for s in rounds)
        for parts in repeats
    ]
    return {
        "microbatches": count,
        "variant": name,
        "seconds": statistics.median(seconds),
        "least_s": min(seconds),
        "predicted_s": sum(makespan(_with(problem, schedule)) for schedule in rounds),
        "over_replayed": statistics.median(replayed),
        "model_peak": model_peak(rounds),
        "peak_over_model": _peak_over_model(name, results),
    }


def _with(problem: Problem, schedule: Schedule) -> Schedule:
    names = [p.name for p in schedule.problem.pipelines]
    own = replace(problem, pipelines=tuple(problem.pipeline(name) for name in names))
    return Schedule(own, schedule.rows)


def _peak_over_model(name: str, results: Sequence[Measured]) -> float:
    """Bytes held at most over those that the memory model counts, on the rank that holds most."""
    ratios = []
    for rank, result in enumerate(results):
        model = 0.0
        for schedule in result.rounds[name]:
            weighed = tuple(
                replace(p, activation=activation, activation_after_input=activation)
                for p in schedule.problem.pipelines
                for activation in ((result.alone[p.name] / p.num_microbatches,) * p.num_stages,)
            )
            held = Schedule(replace(schedule.problem, pipelines=weighed), schedule.rows)
            model = max(model, peak_memory(held)[rank])
        ratios.append(result.peak[name] / model)
    return max(ratios)


def training_s(parts: Sequence[list[Span]]) -> float:
    """From the first task of any rank to the last."""
    spans = [s for part in parts for s in part if s.kind in TASKS]
    return max(s.end_s for s in spans) - min(s.start_s for s in spans)


def with_ratios(rows: Sequence[dict[str, float | int | str]]) -> list[Row]:
    """Beside each: the gain over serial 1F1B of as many micro-batches, measured and predicted, and
    over serial 1F1B at its best count."""

    def number(row: Mapping[str, float | int | str], key: str) -> float:
        return float(row[key])

    def ratio(row: Mapping[str, float | int | str]) -> float:
        return number(serial[row["microbatches"]], "seconds") / number(row, "seconds")

    def predicted(row: Mapping[str, float | int | str]) -> float:
        return number(serial[row["microbatches"]], "predicted_s") / number(row, "predicted_s")

    serial = {row["microbatches"]: row for row in rows if row["variant"] == "serial 1F1B"}
    best_s = min(number(row, "seconds") for row in serial.values())
    return [
        {
            **row,
            "ratio": ratio(row),
            "predicted_ratio": predicted(row),
            "ratio_over_predicted": ratio(row) / predicted(row),
            "over_best_serial": best_s / number(row, "seconds"),
        }
        for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microbatches", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--tokens", type=int, default=8000, help="of one update, whatever the cut")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7, help="at most")
    parser.add_argument("--equal-memory", action="store_true")
    parser.add_argument("--name", default="bench_update")
    parser.add_argument("--limit-s", type=float, default=120, help="of measuring, in all")
    asked = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        save_models(Path(folder), asked.width, asked.vocabulary)
        for count in asked.microbatches:
            results = measure(asked, count, Path(folder))
            rows += [row_of(name, count, results) for name in results[0].rounds]
    table = with_ratios(rows)
    print_table(table)
    print(write_result(asked.name, table))


if __name__ == "__main__":
    main()
