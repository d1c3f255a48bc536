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
    """Cluster size, response limit and batch, halved and doubled one at a time. The instance and
    stage sizes stay; a condition that fits in no layout is left out."""
    config, cluster = _fixed(found), found.cluster
    rows = []
    tried: list[tuple[str, Config, Cluster]] = [("as planned", config, cluster)]
    for factor in (0.5, 2):
        devices = int(cluster.num_devices * factor)
        if cluster.device.name != "cpu":
            # On CPUs the pipelines are as long as there are devices: no other number to compare.
            other = Cluster(cluster.device, devices, cluster.devices_per_node)
            tried.append((f"{devices} devices", config, other))
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
        row = _row(name, changed, where, recorded)
        if row is not None:
            rows.append(row)
    return rows


def _row(name: str, config: Config, cluster: Cluster, recorded: Sequence[int]) -> WhatIfRow | None:
    try:
        found = evaluate(config, workload_of(config, recorded), cluster, quick=True)
    except ValueError:
        return None
    serial_s, fused_s = found.serial.step, found.fused.step
    return WhatIfRow(
        name=name,
        devices=cluster.num_devices,
        response_length=config.rollout.response_length,
        train_batch_size=config.data.train_batch_size,
        serial_s=serial_s,
        fused_s=fused_s,
        speedup=serial_s / fused_s,
        samples_per_s=found.workload.num_samples / fused_s,
    )


def _fixed(found: Evaluated) -> Config:
    """What was found, written down, so that only what is asked about changes; and lengths in
    tokens, which a default would take from the limit."""
    sizes = {t.role: t.parallel for t in found.training.fused}
    limit = found.config.rollout.response_length
    plan = msgspec.structs.replace(
        found.config.plan,
        rollout_tp=found.rollout.layout.tp,
        actor_tp=sizes["actor"].tp,
        actor_pp=sizes["actor"].pp,
        response_median=found.config.plan.response_median or max(1, limit // 6),
    )
    if "critic" in sizes:
        plan = msgspec.structs.replace(
            plan, critic_tp=sizes["critic"].tp, critic_pp=sizes["critic"].pp
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
    """What would make samples cheaper or steps shorter, best first."""
    told = []
    training = found.training
    if found.intra_pays or len(training.fused) == 1:
        split = found.workload.num_minibatches * (
            training.fused_s - sum(t.exchange_s for t in training.fused)
            - training.split_schedule_s
        )  # fmt: skip
        told.append(
            (split / found.fused.step, "splitting the weight gradient off (fusion.split_weight)")
        )
    base = rows[0] if rows else None
    for row in rows[1:]:
        assert base is not None
        told.append((1 - row.fused_s * base.samples_per_s / row.samples_per_s / row.fused_s,
                     f"{row.name}: {row.samples_per_s:.1f} samples/s instead of "
                     f"{base.samples_per_s:.1f}"))  # fmt: skip
    told = [item for item in told if item[0] >= LEAST_HELP]
    return [f"{text} ({saving:.0%} less time a sample)" for saving, text in sorted(told)[::-1][:4]]
