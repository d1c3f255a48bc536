"""Where the costs of a prediction come from: an earlier run's folder, or the hardware's data."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import torch

from rlhfuse.config import Config
from rlhfuse.config_file import load
from rlhfuse.cost import CostModel
from rlhfuse.hardware import DEVICES, Cluster, Device, device
from rlhfuse.placement import replicas, roles_of
from rlhfuse.planner import costs
from rlhfuse.planner.costs import Parallel
from rlhfuse.planner.measured import MeasuredStep, StepCosts, fit_step_costs
from rlhfuse.planner.workload import Workload
from rlhfuse.resolve import Resolved
from rlhfuse.run_folder import RunFolder
from rlhfuse.timeline import load_chrome
from rlhfuse.update_plan import StageCosts

logger = logging.getLogger(__name__)
LAST_STEPS = 4  # of the earlier run
Metrics = dict[str, float]


def step_costs(run: Resolved, workload: Workload) -> tuple[StepCosts, Metrics]:
    """Measured costs where this run's folder holds steps of the same models and devices, with
    that run's last metrics; else what the hardware's data say, and no metrics."""
    given = described(run, workload)
    folder = RunFolder(run.config.trainer).path
    try:
        found = _measured(run, folder, given)
    except (OSError, ValueError) as error:
        logger.warning("the earlier run in %s is not used: %s", folder, error)
        found = None
    return found if found is not None else (given, {})


def described(run: Resolved, workload: Workload) -> StepCosts:
    """From the hardware's data alone; of a CPU the decode steps are `CostModel.default`'s."""
    config = run.config
    kind = hardware(config)
    cluster = Cluster(kind, config.placement.num_devices, config.plan.devices_per_node)
    rollout = costs.rollout_costs(
        workload.models, workload.scored, cluster, 1, 1, workload.mean_total / 2
    )
    if kind.name == "cpu":
        rollout = replace(rollout, migrate_call_s=CostModel.default().migrate_call_s)
    stages, exchange_s = {}, 0.0
    for role in roles_of(run.pipelines):
        placed = run.pipelines[role]
        dp = len(replicas(run.pipelines, role))
        stages[role] = _per_token(workload, role, cluster, placed.layers)
        exchange_s += costs.exchange_s(
            workload.models[role], role, cluster, Parallel(1, len(placed.ranks), dp)
        )
    task_s = kind.efficiency.task_s
    origin = f"the data of {kind.name} ({kind.source}); nothing was measured"
    return StepCosts(rollout, stages, 2 * task_s, exchange_s, rollout.weight_sync_s, origin)


def hardware(config: Config) -> Device:
    """The device that the plan section names, or that is here."""
    if config.plan.hardware != "auto":
        return device(config.plan.hardware)
    cuda = config.placement.device != "cpu" and torch.cuda.is_available()
    if not cuda:
        return device("cpu")
    name = torch.cuda.get_device_name(0)
    for known in DEVICES:
        if known.name.upper() in name.upper():
            return known
    logger.warning("%s: its data are not known, predicting for an H100 (plan.hardware)", name)
    return device("h100")


def _per_token(
    workload: Workload, role: str, cluster: Cluster, layers: tuple[tuple[int, int], ...]
) -> StageCosts:
    tokens = max(1.0, workload.tokens_per_minibatch / 4)
    times = costs.stage_times(
        workload.models[role],
        role,
        cluster,
        Parallel(1, len(layers), 1),
        tokens,
        workload.mean_total,
        recompute=False,
        layers=[end - first for first, end in layers],
    )
    return StageCosts(
        forward=tuple(t / tokens for t in times.forward),
        backward=tuple(t / tokens for t in times.backward),
        weight=tuple(t / tokens for t in times.weight),
    )


def _measured(run: Resolved, folder: Path, given: StepCosts) -> tuple[StepCosts, Metrics] | None:
    if not (folder / "config.yaml").is_file() or not (folder / "metrics.jsonl").is_file():
        return None
    earlier = load(folder / "config.yaml")
    different = [name for name, a, b in _alike(earlier, run.config) if a != b]
    if different:
        logger.warning(
            "the earlier run in %s had another %s: its costs are not used", folder, different[0]
        )
        return None
    steps, metrics = [], {}
    for row in metrics_rows(folder / "metrics.jsonl"):
        file = folder / "timeline" / f"step_{row.get('step', 0):.0f}.json"
        if "timing_s/update" in row and file.is_file():
            steps.append((row, file))
            metrics = row
    measured = [
        MeasuredStep(
            load_chrome(file),
            int(row["perf/total_num_tokens"]),
            row["timing_s/update"],
            row["timing_s/update_weights"],
        )
        for row, file in steps[-LAST_STEPS:]
    ]
    if not measured:
        return None
    origin = f"measured: the last {len(measured)} steps in {folder}"
    return fit_step_costs(run.config, measured, given, origin), metrics


def _alike(a: Config, b: Config) -> list[tuple[str, object, object]]:
    """What must be the same for costs to be the same."""
    return [
        ("actor.path", a.actor.path, b.actor.path),
        ("critic.path", a.critic.path, b.critic.path),
        ("reward.path", a.reward.path, b.reward.path),
        ("rollout.engine", a.rollout.engine, b.rollout.engine),
        ("placement", a.placement, b.placement),
    ]


def metrics_rows(path: Path) -> list[Metrics]:
    """The numbers of every line; one that was cut off by a crash is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            tree = json.loads(line)
        except ValueError:
            continue
        rows.append({k: float(v) for k, v in tree.items() if isinstance(v, int | float)})
    return rows
