"""Generation and inference of one step, by the simulator, under every policy that could be used."""

from dataclasses import dataclass, replace

import msgspec

from rlhfuse.config import Config
from rlhfuse.cost import CostModel
from rlhfuse.hardware import Cluster
from rlhfuse.planner import costs
from rlhfuse.planner.workload import Workload
from rlhfuse.rollout.policy import InterStage, Migration, Policy
from rlhfuse.rollout.simulator import Stats, simulate
from rlhfuse.timeline import Timeline

LEAST_GAIN = 0.02  # of generation and inference: less is within what a prediction can be wrong


class RolloutLayout(msgspec.Struct, frozen=True):
    """`instances` generation instances of `tp` devices; one scorer spans `block` of them."""

    tp: int
    instances: int
    block: int
    cache_tokens: int  # room for keys and values of one instance


@dataclass(frozen=True, slots=True)
class RolloutPrediction:
    """Seconds from the first prompt on. `policies`: end by the name of what would be allowed."""

    layout: RolloutLayout
    cost: CostModel
    serial: Stats
    fused: Stats
    migration: str  # of `fused`: auto, paper, off
    policies: dict[str, float]


def policy_of(config: Config, layout: RolloutLayout) -> Policy:
    """The limits that a configuration sets; both fusions as free as they can be."""
    return Policy(
        max_response_tokens=config.rollout.response_length,
        max_running=config.rollout.max_num_seqs,
        cache_tokens=config.rollout.cache_tokens or layout.cache_tokens,
        margin=config.fusion.migration_margin,
        score_token_budget=config.rollout.score_token_budget,
        block=layout.block,
    )


def predict_rollout(
    workload: Workload, layout: RolloutLayout, cost: CostModel, policy: Policy
) -> RolloutPrediction:
    """Serial, and every way to overlap; the fastest is `fused`, early scoring alone where moving
    the tail gains nothing."""
    serial = run(workload, layout, cost, replace(policy, inter_stage=InterStage.OFF))[1]
    found = {
        "off": run(workload, layout, cost, replace(policy, migration=Migration.OFF))[1],
        "auto": run(workload, layout, cost, policy)[1],
        "paper": run(workload, layout, cost, replace(policy, migration=Migration.PAPER))[1],
    }
    best = "off" if found["off"].end_s <= found["auto"].end_s else "auto"
    ends = {"serial": serial.end_s, **{name: stats.end_s for name, stats in found.items()}}
    return RolloutPrediction(layout, cost, serial, found[best], best, ends)


def run(
    workload: Workload,
    layout: RolloutLayout,
    cost: CostModel,
    policy: Policy,
    *,
    record: bool = False,
    train: bool = False,
) -> tuple[Timeline, Stats]:
    """One simulated rollout. `train`: with forward and backward of complete groups."""
    return simulate(
        cost,
        policy,
        workload.lengths,
        workload.prompts,
        layout.instances,
        workload.scored,
        groups=[i // workload.per_prompt for i in range(workload.num_samples)] if train else None,
        history=workload.history,
        train=train,
        record=record,
    )


def policy_named(policy: Policy, migration: str) -> Policy:
    """`policy` with what `RolloutPrediction.migration` names; ``serial``: nothing overlaps."""
    if migration == "serial":
        return replace(policy, inter_stage=InterStage.OFF)
    return replace(policy, migration=Migration(migration))


def candidates(
    config: Config, workload: Workload, cluster: Cluster, held_bytes: float
) -> list[tuple[RolloutLayout, CostModel]]:
    """Instances that hold the actor and at least one sample beside `held_bytes` of training
    state on each device, with their costs."""
    wanted = config.plan.rollout_tp
    sizes = [n for n in (1, 2, 4, 8) if n <= cluster.node_size] if not wanted else [wanted]
    found = []
    for tp in sizes:
        made = _candidate(workload, cluster, tp, held_bytes)
        if made is not None:
            mean = workload.mean_total / 2
            cost = costs.rollout_costs(
                workload.models, workload.scored, cluster, tp, made.block, mean
            )
            found.append((made, cost))
    return found


def _candidate(
    workload: Workload, cluster: Cluster, tp: int, held_bytes: float
) -> RolloutLayout | None:
    models = workload.models
    if cluster.num_devices % tp or not models["actor"].splits(tp):
        return None
    usable = costs.USABLE * cluster.device.memory_bytes - held_bytes
    room = usable - costs.engine_bytes(models, cluster, tp)
    tokens = room / costs.cache_bytes(models, cluster, tp)
    if tokens < workload.limit + max(workload.prompts):
        return None
    block, instances = 1, cluster.num_devices // tp
    # A scorer takes the place of keys and values; where it is too large, neighbours share it.
    while costs.scorer_bytes(models, workload.scored, cluster, tp * block) > room:
        block *= 2
        if instances % block:
            return None
    return RolloutLayout(tp, instances, block, int(tokens))


def sliced(
    workload: Workload, layout: RolloutLayout, most_samples: int, most_instances: int = 1 << 30
) -> tuple[Workload, RolloutLayout]:
    """A slice of the cluster with its share of the samples: evenly spread over the lengths, so
    that what is typical stays typical."""
    parts = 1
    while (
        workload.num_samples / parts > most_samples or layout.instances / parts > most_instances
    ) and (
        layout.instances % (2 * parts) == 0
        and (layout.instances // (2 * parts)) % layout.block == 0
        and workload.num_samples % (2 * parts * workload.per_prompt) == 0
    ):
        parts *= 2
    if parts == 1:
        return workload, layout
    order = sorted(range(workload.num_samples), key=lambda i: (-workload.lengths[i], i))
    kept = sorted(order[::parts])
    some = replace(
        workload,
        lengths=tuple(workload.lengths[i] for i in kept),
        prompts=tuple(workload.prompts[i] for i in kept),
        history=workload.history[: max(256, len(kept))],
    )
    return some, msgspec.structs.replace(layout, instances=layout.instances // parts)
