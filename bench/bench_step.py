"""How much faster is one PPO step with fusion than without, and which stage gains?

Runs the same steps of a configuration from the same start on the same workers, serially and
fused in turn, and prints medians side by side. Every pair is also checked to be bit-identical.

    python -m bench.bench_step configs/quickstart.yaml --repeats 5

A pair during which others used more than `--others` of the machine's processors is run again, up to
as many times as there are repeats; without that the busier of both modes would lose more.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence

import msgspec

from bench.processor_time import used
from bench.record import Row, print_table, write_result
from rlhfuse.config import Config
from rlhfuse.config_file import load
from rlhfuse.resolve import resolve
from rlhfuse.session import open_session
from rlhfuse.trainer import Fusions, StepResult, Trainer

SERIAL = Fusions(inter_stage=False, intra_stage=False)
FUSED = Fusions(inter_stage=True, intra_stage=True)
STAGES = {
    "generation": "timing_s/gen",
    "generation+scoring": "timing_s/rollout",
    "training": "timing_s/update",
    "weights": "timing_s/update_weights",
    "step": "timing_s/step",
}


def measure(
    config: Config, steps: int, repeats: int, most_others: float
) -> tuple[list[StepResult], list[StepResult]]:
    """`repeats` pairs of (serial, fused) results of the last of `steps` steps."""
    serial: list[StepResult] = []
    fused: list[StepResult] = []
    with open_session(resolve(config), resume=False) as session:
        start = Trainer(session).save()
        tries = 2 * repeats
        while tries and len(fused) < repeats:
            tries -= 1
            before = used()
            for fusions, results in ((SERIAL, serial), (FUSED, fused)):
                session.load(start)
                trainer = Trainer(session, fusions)
                trainer.sync_weights()
                # The first steps teach the cost model; the last one is measured.
                results.append([trainer.step() for _ in range(steps)][-1])
            assert serial[-1].weights == fused[-1].weights, "fused and serial weights differ"
            assert serial[-1].tokens == fused[-1].tokens, "fused and serial tokens differ"
            if used().others_share(before) > most_others and tries >= repeats - len(fused) + 1:
                serial.pop()
                fused.pop()
    return serial, fused


def rows_of(serial: Sequence[StepResult], fused: Sequence[StepResult]) -> list[Row]:
    """One row per stage: medians, their ratio, the spread of the pairs' ratios."""
    rows: list[Row] = []
    for stage, name in STAGES.items():
        a = [r.metrics[name] for r in serial]
        b = [r.metrics[name] for r in fused]
        ratios = [x / y for x, y in zip(a, b, strict=True)]
        rows.append(
            {
                "stage": stage,
                "serial_s": statistics.median(a),
                "fused_s": statistics.median(b),
                "ratio": statistics.median(a) / statistics.median(b),
                "least_ratio": min(ratios),
                "greatest_ratio": max(ratios),
            }
        )
    for name in ("perf/idle_fraction", "perf/controller_share", "fusion/moved_samples"):
        a = [r.metrics.get(name, 0.0) for r in serial]
        b = [r.metrics.get(name, 0.0) for r in fused]
        rows.append(
            {
                "stage": name,
                "serial_s": statistics.median(a),
                "fused_s": statistics.median(b),
                "ratio": 0.0,
                "least_ratio": 0.0,
                "greatest_ratio": 0.0,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps in a run; the last counts")
    parser.add_argument("--others", type=float, default=1.0, help="Share of the processors.")
    parser.add_argument("--name", default="bench_step")
    args = parser.parse_args()
    config = load(args.config, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        trainer = msgspec.structs.replace(
            config.trainer,
            default_local_dir=folder,
            total_training_steps=args.steps,
            logger=("jsonl",),
        )
        config = msgspec.structs.replace(config, trainer=trainer)
        serial, fused = measure(config, args.steps, args.repeats, args.others)
    rows = rows_of(serial, fused)
    print_table(rows)
    print(write_result(args.name, rows))


if __name__ == "__main__":
    main()
