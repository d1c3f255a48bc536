"""A recorded step of our own with other fusions: what the planner's simulation says of it."""

from pathlib import Path

import msgspec

from rlhfuse.config import Config, FusionConfig
from rlhfuse.config_file import load
from rlhfuse.cost import CostModel
from rlhfuse.planner.measured import MeasuredStep, StepCosts, other_fusions, without_fusion
from rlhfuse.planner.workload import with_lengths, workload_of
from rlhfuse.profiler.summary import WhatIf
from rlhfuse.resolve import resolve
from rlhfuse.run_costs import Metrics, metrics_rows
from rlhfuse.run_folder import RunFolder
from rlhfuse.timeline import load_chrome

FUSED = "both fusions, simulated with the costs of this step"
SERIAL = "no fusion, simulated with the costs of this step"


def simulated_what_if(path: Path, step: int) -> tuple[WhatIf, str]:
    """The other way to run a step of a run's folder: serial where it was fused, and fused where it
    was serial; and how near the simulation of what ran comes to what was measured.

    Raises:
        ValueError: the folder does not hold what that takes, or the run cannot be resolved here.
    """
    try:
        config = load(path / "config.yaml")
        folder = RunFolder(config.trainer, path)
        lengths = folder.read_lengths()
        rows: dict[int, Metrics] = {}
        for part in metrics_rows(path / "metrics.jsonl"):  # validation has rows of its own
            rows.setdefault(int(part["step"]), {}).update(part)
    except OSError as error:
        raise ValueError(f"{error.filename}: {error.strerror}") from error
    if step not in lengths or "fusion/serial" not in rows.get(step, {}):
        raise ValueError(f"{path}: no lengths and metrics of step {step}")
    row, sampled = rows[step], lengths[step]
    measured = MeasuredStep(
        load_chrome(folder.timeline(step)),
        int(row["perf/total_num_tokens"]),
        row["timing_s/update"],
        row["timing_s/update_weights"],
    )
    run = resolve(config)
    history = [n for s, before in lengths.items() if s < step for n in before.lengths]
    workload = with_lengths(workload_of(config), sampled.lengths, sampled.prompts, history)
    off, on = without_fusion(config), _with_fusion(config)
    was_serial = row["fusion/serial"] > 0
    saved_s, simulated = other_fusions(
        on if was_serial else off,
        workload,
        run.pipelines,
        off if was_serial else on,
        measured,
        StepCosts(CostModel.default(), run.costs, 0.0, 0.0, 0.0, "default"),
        step=step,
    )
    step_s = row["timing_s/step"]
    told = f"simulated with its own costs, the step as it ran takes {simulated:.1%} of its time"
    found = WhatIf(FUSED if was_serial else SERIAL, step_s - saved_s, saved_s / step_s)
    return found, told


def _with_fusion(config: Config) -> Config:
    """What the run would have used if it fused; the default where it never does."""
    if config.fusion.inter_stage != "off" or config.fusion.intra_stage != "off":
        return config
    usual = FusionConfig()
    fusion = msgspec.structs.replace(
        config.fusion, inter_stage=usual.inter_stage, intra_stage=usual.intra_stage
    )
    return msgspec.structs.replace(config, fusion=fusion)
