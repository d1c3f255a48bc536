"""Does the simulator predict a live step? Costs are fitted from two steps, then held against the
steps that follow, whose response lengths the simulator is told.

    python -m bench.bench_calibration configs/quickstart.yaml --steps 9

Step 1 warms up (compilation, first touch), steps 2 and 3 are fitted from, every fourth step runs
serially. The last column of the result predicts without knowing the lengths: the step's samples
drawn again from the lengths of the steps before.
"""

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from bench.record import Row, print_table, write_result
from rlhfuse.config import Config
from rlhfuse.config_file import load
from rlhfuse.cost import CostModel
from rlhfuse.planner.measured import (
    MeasuredStep,
    StepCosts,
    fit_step_costs,
    predict_one,
    without_fusion,
)
from rlhfuse.planner.workload import with_lengths, workload_of
from rlhfuse.resolve import resolve
from rlhfuse.rollout.loop import RolloutResult
from rlhfuse.session import open_session
from rlhfuse.step_metrics import StepTimes
from rlhfuse.timeline import load_chrome
from rlhfuse.trainer import Fusions, StepResult, Trainer
from rlhfuse.update_plan import UpdatePlan

WARM_UP, FITTED = 1, 2


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
        for number in range(1, steps + 1):
            serial = number > WARM_UP + FITTED and number % serial_every == 0
            trainer.forced = Fusions(inter_stage=not serial, intra_stage=not serial)
            result = trainer.step()
            prompts, lengths = trainer.lengths[number]
            metrics = {**result.metrics, "serial": float(serial)}
            done.append(Step(number, prompts, lengths, metrics))
        return Live(config, tuple(done), session.folder.path)


def fitted(live: Live, config: Config) -> StepCosts:
    """Costs from the two steps after the first."""
    run = resolve(config)
    previous = StepCosts(CostModel.default(), run.costs, 0.0, 0.0, 0.0, "default")
    steps = [
        MeasuredStep(
            load_chrome(live.folder / "timeline" / f"step_{s.step}.json"),
            int(s.metrics["perf/total_num_tokens"]),
            s.metrics["timing_s/update"],
            s.metrics["timing_s/update_weights"],
        )
        for s in live.steps[WARM_UP : WARM_UP + FITTED]
    ]
    return fit_step_costs(config, steps, previous, "two steps")


def rows_of(live: Live) -> list[Row]:
    """Predicted and measured seconds of every step after those that were fitted from."""
    config = live.config
    costs, pipelines = fitted(live, config), resolve(config).pipelines
    rows: list[Row] = []
    for number in range(WARM_UP + FITTED, len(live.steps)):
        step = live.steps[number]
        serial = step.metrics["serial"] > 0
        chosen = without_fusion(config) if serial else config
        history = [n for earlier in live.steps[:number] for n in earlier.lengths]
        known = with_lengths(workload_of(config), step.lengths, step.prompts, history)
        told, _ = predict_one(chosen, known, pipelines, costs, step=step.step)
        drawn = workload_of(config, history, seed=number).lengths
        blind = with_lengths(known, drawn, step.prompts, history)
        guessed, _ = predict_one(chosen, blind, pipelines, costs, step=step.step)
        live_s = step.metrics["timing_s/step"]
        rows.append(
            {
                "step": step.step,
                "mode": "serial" if serial else "fused",
                "rollout_s": step.metrics["timing_s/rollout"],
                "predicted_rollout_s": told.generation + told.inference,
                "update_s": step.metrics["timing_s/update"],
                "predicted_update_s": told.training,
                "step_s": live_s,
                "predicted_step_s": told.step,
                "error": told.step / live_s - 1,
                "blind_error": guessed.step / live_s - 1,
            }
        )
    return rows


def summary(rows: Sequence[Row]) -> Row:
    """Medians of the errors' sizes, and of all steps together."""

    def total(name: str) -> float:
        return sum(float(row[name]) for row in rows)

    sizes = [abs(float(row["error"])) for row in rows]
    return {
        "steps": len(rows),
        "median_abs_error": statistics.median(sizes),
        "greatest_abs_error": max(sizes),
        "error_of_sum": total("predicted_step_s") / total("step_s") - 1,
        "median_abs_blind_error": statistics.median(abs(float(r["blind_error"])) for r in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--steps", type=int, default=9)
    parser.add_argument("--serial-every", type=int, default=4)
    parser.add_argument("--name", default="bench_calibration")
    parser.add_argument("--keep", type=Path, help="Folder for the run, to look at it again.")
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
        live = run_live(config, args.steps, args.serial_every)
        if args.keep:
            (live.folder / "lengths.json").write_bytes(msgspec.json.encode(live.steps))
        rows = rows_of(live)
    print_table(rows)
    found = summary(rows)
    print_table([found])
    print(write_result(args.name, [*rows, found]))


if __name__ == "__main__":
    main()
