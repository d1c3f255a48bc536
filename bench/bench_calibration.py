"""Does the simulator predict a live step? Costs are fitted from two steps, then held against the
steps that follow, whose response lengths the simulator is told.

    python -m bench.bench_calibration configs/quickstart.yaml

Step 1 warms up (compilation, first touch); costs are fitted from the first two steps after it in
which others used less than a twentieth of the machine's processors (`others_share`), and steps
with more are left out of the summary: a busy machine is no calibration. After those, serial and
fused steps take turns. `blind_error`: lengths drawn again from those of earlier steps. A run of
`rlhfuse train` that is over can be held against the simulator, too; what others used of the machine
meanwhile is not known then:

    python -m bench.bench_calibration configs/quickstart.yaml --again runs/rlhfuse/quickstart
"""

import argparse
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.processor_time import used
from bench.record import Row, print_table, write_result
from rlhfuse.config import Config
from rlhfuse.config_file import load
from rlhfuse.cost import CostModel
from rlhfuse.placement import StagePlacement
from rlhfuse.planner.measured import (
    MeasuredStep,
    StepCosts,
    fit_step_costs,
    predict_one,
    without_fusion,
)
from rlhfuse.planner.workload import with_lengths, workload_of
from rlhfuse.resolve import resolve
from rlhfuse.rollout.records import RolloutResult
from rlhfuse.run_costs import metrics_rows
from rlhfuse.run_folder import RunFolder
from rlhfuse.session import open_session
from rlhfuse.step_metrics import StepTimes
from rlhfuse.timeline import load_chrome
from rlhfuse.trainer import Fusions, StepResult, Trainer
from rlhfuse.update_plan import UpdatePlan

WARM_UP, FITTED = 1, 2
OTHERS, MOST_OTHERS = "others_share", 0.05


class Step(msgspec.Struct, frozen=True):
    """One live step: its samples and its metrics."""

    step: int
    prompts: tuple[int, ...]
    lengths: tuple[int, ...]
    metrics: dict[str, float]


class _Recorder(Trainer):
    """A trainer that remembers how long its samples were."""

    lengths: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]

    def record(
        self,
        step: int,
        rollout: RolloutResult,
        plan: UpdatePlan,
        trained: dict[str, float],
        weights: str,
        times: StepTimes,
        fusions: Fusions,
    ) -> StepResult:
        records = sorted(rollout.records, key=lambda r: r.sample_id)
        self.lengths[step] = (
            tuple(len(r.prompt) for r in records),
            tuple(len(r.response_ids) for r in records),
        )
        return super().record(step, rollout, plan, trained, weights, times, fusions)


@dataclass(frozen=True)
class Live:
    """A run that is over. `folder` holds its timelines."""

    config: Config
    steps: tuple[Step, ...]
    folder: Path


def run_live(config: Config, steps: int, serial_every: int) -> Live:
    with open_session(resolve(config), resume=False) as session:
        trainer = _Recorder(session)
        trainer.lengths = {}
        trainer.sync_weights()
        done = []
        before = used()
        for number in range(1, steps + 1):
            serial = number > WARM_UP + FITTED and number % serial_every == 0
            trainer.forced = Fusions(inter_stage=not serial, intra_stage=not serial)
            result = trainer.step()
            prompts, lengths = trainer.lengths[number]
            now = used()
            metrics = {
                **result.metrics,
                "serial": float(serial),
                OTHERS: now.others_share(before),
            }
            before = now
            done.append(Step(number, prompts, lengths, metrics))
        return Live(config, tuple(done), session.folder.path)


def steps_of(folder: Path, config: Config) -> tuple[Step, ...]:
    """Of a run that --keep kept, or of any run's folder."""
    kept = folder / "lengths.json"
    if kept.exists():
        return msgspec.json.decode(kept.read_bytes(), type=tuple[Step, ...])
    metrics: dict[int, dict[str, float]] = {}
    for row in metrics_rows(folder / "metrics.jsonl"):  # validation has rows of its own
        metrics.setdefault(int(row["step"]), {}).update(row)
    lengths = RunFolder(config.trainer, folder).read_lengths()
    return tuple(
        Step(
            step,
            tuple(sampled.prompts),
            tuple(sampled.lengths),
            {**metrics[step], "serial": metrics[step]["fusion/serial"], OTHERS: 0.0},
        )
        for step, sampled in sorted(lengths.items())
    )


def rows_of(live: Live) -> list[Row]:
    """Predicted and measured seconds of every step but the first and those fitted from."""
    config, run = live.config, resolve(live.config)
    lines = {
        s.step: load_chrome(live.folder / "timeline" / f"step_{s.step}.json") for s in live.steps
    }
    after = live.steps[WARM_UP:]
    clean = [s for s in after if s.metrics[OTHERS] <= MOST_OTHERS]
    chosen = (clean if len(clean) > FITTED else list(after))[:FITTED]
    measured = [
        MeasuredStep(
            lines[s.step],
            int(s.metrics["perf/total_num_tokens"]),
            s.metrics["timing_s/update"],
            s.metrics["timing_s/update_weights"],
        )
        for s in chosen
    ]
    previous = StepCosts(CostModel.default(), run.costs, 0.0, 0.0, 0.0, "default")
    costs = fit_step_costs(config, measured, previous, "two steps")
    return [_row(live, step, run.pipelines, costs) for step in after if step not in chosen]


def _row(
    live: Live,
    step: Step,
    pipelines: Mapping[str, StagePlacement],
    costs: StepCosts,
) -> Row:
    config = live.config
    serial = step.metrics["serial"] > 0
    chosen = without_fusion(config) if serial else config
    history = [n for s in live.steps if s.step < step.step for n in s.lengths]
    known = with_lengths(workload_of(config), step.lengths, step.prompts, history)
    told, _ = predict_one(chosen, known, pipelines, costs, step=step.step)
    drawn = workload_of(config, history, seed=step.step).lengths
    blind = with_lengths(known, drawn, step.prompts, history)
    guessed, _ = predict_one(chosen, blind, pipelines, costs, step=step.step)
    live_s = step.metrics["timing_s/step"]
    return {
        "step": step.step,
        "mode": "serial" if serial else "fused",
        OTHERS: step.metrics[OTHERS],
        "tokens": sum(step.lengths),
        "rollout_s": step.metrics["timing_s/rollout"],
        "predicted_rollout_s": told.generation + told.inference,
        "update_s": step.metrics["timing_s/update"],
        "predicted_update_s": told.training,
        "step_s": live_s,
        "predicted_step_s": told.step,
        "error": told.step / live_s - 1,
        "blind_error": guessed.step / live_s - 1,
    }


def summary(rows: Sequence[Row]) -> Row:
    """Sizes of the errors over the steps that had the machine to themselves."""
    clean = [row for row in rows if float(row[OTHERS]) <= MOST_OTHERS]
    if not clean:
        return {"steps": len(rows), "steps_alone": 0}

    def total(name: str) -> float:
        return sum(float(row[name]) for row in clean)

    sizes = [abs(float(row["error"])) for row in clean]
    live_ratio, told_ratio = _fused_over_serial(clean)
    return {
        "steps": len(rows),
        "steps_alone": len(clean),
        "within_10_percent": sum(size <= 0.1 for size in sizes),
        "median_abs_error": statistics.median(sizes),
        "greatest_abs_error": max(sizes),
        "error_of_sum": total("predicted_step_s") / total("step_s") - 1,
        "median_abs_blind_error": statistics.median(abs(float(r["blind_error"])) for r in clean),
        "fused_over_serial": live_ratio,
        "predicted_fused_over_serial": told_ratio,
    }


def _fused_over_serial(rows: Sequence[Row]) -> tuple[float, float]:
    """Of seconds per response token (every step draws its own lengths): live, predicted."""

    def ratio(name: str) -> float:
        rates: dict[str, list[float]] = {"fused": [], "serial": []}
        for row in rows:
            rates[str(row["mode"])].append(float(row[name]) / float(row["tokens"]))
        if not all(rates.values()):
            return float("nan")
        return statistics.median(rates["fused"]) / statistics.median(rates["serial"])

    return ratio("step_s"), ratio("predicted_step_s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=13)
    parser.add_argument("--serial-every", type=int, default=2)
    parser.add_argument("--name", default="bench_calibration")
    parser.add_argument("--keep", type=Path, help="Keep the run below this folder.")
    parser.add_argument("--again", type=Path, help="Predict a run that is over, by its folder.")
    args = parser.parse_args()
    config = load(args.config, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        trainer = msgspec.structs.replace(
            config.trainer,
            default_local_dir=str(args.keep or folder),
            total_training_steps=args.steps,
            logger=("jsonl",),
        )
        fusion = msgspec.structs.replace(config.fusion, audit_every=0)
        config = msgspec.structs.replace(config, trainer=trainer, fusion=fusion)
        if args.again:
            live = Live(config, steps_of(args.again, config), args.again)
        else:
            live = run_live(config, args.steps, args.serial_every)
            (live.folder / "lengths.json").write_bytes(msgspec.json.encode(live.steps))
        rows = rows_of(live)
    print_table(rows)
    found = summary(rows)
    print_table([found])
    print(write_result(args.name, [*rows, found]))


if __name__ == "__main__":
    main()
