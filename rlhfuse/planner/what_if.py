"""The same plan under other conditions, and which of them would help."""

from collections.abc import Sequence

import msgspec

from rlhfuse.config import Config
from rlhfuse.hardware import Cluster
from rlhfuse.planner.evaluate import Evaluated, evaluate
from rlhfuse.planner.summary import WhatIfRow
from rlhfuse.planner.workload import workload_of

LEAST_HELP = 0.03


def what_if(found: Evaluated, recorded: Sequence[int] = ()) -> list[WhatIfRow]:
    """The plan itself, then cluster size, response limit and batch, halved and doubled one at a
    time, each by a short search; a condition that fits in no layout is left out."""
    config, cluster = _fixed(found), found.cluster
    rows = [_row("as planned", found)]
    tried: list[tuple[str, Config, Cluster]] = []
    for factor in (0.5, 2):
        devices = max(1, int(cluster.num_devices * factor))
        resized = Cluster(cluster.device, devices, cluster.devices_per_node)
        tried.append((f"{devices} devices", config, resized))
    for factor in (0.5, 2):
        limit = max(1, int(config.rollout.response_length * factor))
        tried.append((f"responses up to {limit}", _limited(config, limit), cluster))
    for factor in (0.5, 2):
        batch = int(config.data.train_batch_size * factor)
        if batch % config.actor.ppo_mini_batch_size == 0 and batch > 0:
            data = msgspec.structs.replace(config.data, train_batch_size=batch)
            changed = msgspec.structs.replace(config, data=data)
            tried.append((f"{batch} prompts a step", changed, cluster))
    for name, changed, where in tried:
        try:
            other = evaluate(changed, workload_of(changed, recorded), where, quick=True)
        except ValueError:
            continue
        rows.append(_row(name, other))
    return rows


def _row(name: str, found: Evaluated) -> WhatIfRow:
    serial_s, fused_s = found.serial.step, found.fused.step
    return WhatIfRow(
        name=name,
        devices=found.cluster.num_devices,
        response_length=found.config.rollout.response_length,
        train_batch_size=found.config.data.train_batch_size,
        serial_s=serial_s,
        fused_s=fused_s,
        speedup=serial_s / fused_s,
        samples_per_s=found.workload.num_samples / fused_s,
    )


def _fixed(found: Evaluated) -> Config:
    """The size of instances that was found, and lengths in tokens, which a default would take
    from the limit. Training layouts are searched anew: both steps get their best."""
    limit = found.config.rollout.response_length
    plan = msgspec.structs.replace(
        found.config.plan,
        rollout_tp=found.rollout.layout.tp,
        response_median=found.config.plan.response_median or max(1, limit // 6),
    )
    return msgspec.structs.replace(found.config, plan=plan)


def _limited(config: Config, limit: int) -> Config:
    rollout = msgspec.structs.replace(
        config.rollout,
        response_length=limit,
        min_response_length=min(limit, config.rollout.min_response_length),
    )
    return msgspec.structs.replace(config, rollout=rollout)


def helpful(found: Evaluated, rows: Sequence[WhatIfRow]) -> list[str]:
    """What would make samples cheaper, best first."""
    training = found.training
    told: list[tuple[float, str]] = []
    if found.intra_pays or (len(training.fused) == 1 and not found.early_pays):
        tasks_s = training.fused_s - sum(t.exchange_s for t in training.fused)
        saved_s = found.workload.num_minibatches * (tasks_s - training.split_schedule_s)
        told.append(
            (saved_s / found.fused.step, "splitting the weight gradient off (fusion.split_weight)")
        )
    for row in rows[1:]:
        before, after = rows[0].samples_per_s, row.samples_per_s
        told.append(
            (1 - before / after, f"{row.name}: {after:.1f} samples/s instead of {before:.1f}")
        )
    told = sorted((item for item in told if item[0] >= LEAST_HELP), reverse=True)
    return [f"{text} ({saving:.0%} less time a sample)" for saving, text in told[:4]]
