"""``rlhfuse plan``: from a configuration to a prediction, a recommendation and what would help."""

import time
from collections.abc import Sequence

from rlhfuse.config import Config
from rlhfuse.config_check import check_for_plan
from rlhfuse.hardware import Cluster, device
from rlhfuse.planner import rollout as ro
from rlhfuse.planner.advice import assumptions, limits, recommendation, warnings, worthwhile
from rlhfuse.planner.early import simulated
from rlhfuse.planner.evaluate import Evaluated, evaluate, memory_of
from rlhfuse.planner.measured_rate import with_measured_training
from rlhfuse.planner.step import Round, bubbles, joined
from rlhfuse.planner.summary import Memory, Pair, Plan, PlanSummary, stage_pairs
from rlhfuse.planner.what_if import helpful, what_if
from rlhfuse.planner.workload import workload_of
from rlhfuse.schedules.ir import Problem, Schedule
from rlhfuse.schedules.timing import makespan, simulate
from rlhfuse.timeline import Timeline

MOST_LANES = 64
MOST_SHOWN = 2048  # samples of the slice whose timeline is kept


def make_plan(
    config: Config,
    recorded: Sequence[int] = (),
    *,
    compare: bool = True,
    measured: Problem | None = None,
) -> Plan:
    """The whole plan. `recorded`: response lengths to draw from; `compare`: with a what-if table;
    `measured`: training costs of one mini-batch on such devices.

    Raises:
        ValueError: a user's mistake, or a model that fits in no layout.
    """
    started = time.monotonic()
    check_for_plan(config)
    cluster = cluster_of(config)
    workload = workload_of(config, recorded)
    if measured is not None:
        cluster = with_measured_training(config, workload, cluster, measured)
    found = evaluate(config, workload, cluster)
    serial, fused = timelines(found)
    weights, optimizer, activations, kv, total = memory_of(found)
    rows = what_if(found, recorded) if compare else []
    summary = PlanSummary(
        hardware=cluster.device.name,
        num_devices=cluster.num_devices,
        step_s=Pair(found.serial.step, found.fused.step),
        stages=stage_pairs(found.serial, found.fused),
        bubble=bubbles(fused),
        bubble_serial=bubbles(serial),
        memory_per_device=Memory(
            weights, optimizer, activations, kv, total, cluster.device.memory_bytes,
            found.offload_s > 0,
        ),
        fits=total <= cluster.device.memory_bytes,
        recommended=recommendation(found),
        worthwhile=worthwhile(found),
        limits=limits(found),
        next_steps=helpful(found, rows),
        what_if=rows,
        assumed=assumptions(found),
        warnings=warnings(found),
        seconds=time.monotonic() - started,
    )  # fmt: skip
    return Plan(summary, serial, fused)


def cluster_of(config: Config) -> Cluster:
    """The cluster that the plan section names.

    Raises:
        ValueError: no hardware is named for a configuration of GPUs.
    """
    plan, name = config.plan, config.plan.hardware
    if name == "auto":
        if config.placement.device == "cuda" or plan.num_nodes:
            raise ValueError(
                "plan.hardware: name the devices to plan for, such as plan.hardware=h100"
            )
        name = "cpu"
    devices = plan.num_nodes * plan.devices_per_node or config.placement.num_devices
    cluster = Cluster(device(name), devices, plan.devices_per_node)
    return cluster.with_network(plan.network_gbps * 1e9 / 8) if plan.network_gbps else cluster


def timelines(found: Evaluated) -> tuple[Timeline, Timeline]:
    """Serial and fused, each shown on one device of every instance of a slice."""
    training = found.training
    serial_rounds = [
        _round(schedule, trained.exchange_s)
        for schedule, trained in zip(training.separate, training.serial, strict=True)
    ]
    rounds = serial_rounds
    if found.intra_pays:
        rounds = [_round(training.schedule, sum(t.exchange_s for t in training.fused))]
    migration = found.rollout.migration if found.inter_pays else "serial"
    group = max(t.parallel.tp for t in training.serial)
    fused = _early(found) if found.early_pays else _timeline(found, migration, rounds, group)
    return _timeline(found, "serial", serial_rounds, group), fused


def _round(schedule: Schedule, exchange_s: float) -> Round:
    return Round(simulate(schedule), makespan(schedule), exchange_s)


def _early(found: Evaluated) -> Timeline:
    """With groups that are trained while others generate."""
    early = found.early
    assert early is not None
    workload, small = ro.sliced(found.workload, early.layout, MOST_SHOWN, MOST_LANES)
    line, stats = simulated(found.config, workload, small, found.cluster, early, record=True)
    end = Round(Timeline(()), 0.0, early.trained.exchange_s)
    lanes = min(small.instances, MOST_LANES)
    others_s = found.rollout.cost.weight_sync_s
    tp = small.tp
    return joined(line, stats.end_s, [end], others_s, lambda i: (f"rank{i * tp}", 0), lanes)


def _timeline(found: Evaluated, migration: str, rounds: list[Round], group: int) -> Timeline:
    layout, cost = found.rollout.layout, found.rollout.cost
    workload, small = ro.sliced(found.workload, layout, MOST_SHOWN, MOST_LANES)
    ranks = max(len(part.tasks.lanes) for part in rounds)
    policy = ro.policy_named(ro.policy_of(found.config, layout), migration)
    line, stats = ro.run(workload, small, cost, policy, record=True)
    tp = layout.tp

    def lane_of(instance: int) -> tuple[str, int]:
        return f"rank{instance * tp}", (instance * tp // group) % ranks

    others_s = cost.weight_sync_s + found.offload_s
    repeated = rounds * found.workload.num_minibatches
    lanes = min(small.instances, MOST_LANES)
    return joined(line, stats.end_s, repeated, others_s, lane_of, lanes)
