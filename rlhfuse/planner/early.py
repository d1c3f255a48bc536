"""Training of complete groups while others still generate: what that would make of a step that has
no critic and one optimizer step (`rlhfuse.group_training`)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from rlhfuse.config import Config
from rlhfuse.group_training import why_never
from rlhfuse.hardware import Cluster
from rlhfuse.planner import costs
from rlhfuse.planner import rollout as ro
from rlhfuse.planner.rollout import RolloutLayout
from rlhfuse.planner.training import Trained
from rlhfuse.planner.workload import Workload
from rlhfuse.rollout.groups import TRAIN
from rlhfuse.rollout.simulator import Stats
from rlhfuse.schedules.ir import Pipeline, Problem
from rlhfuse.schedules.standard import serial
from rlhfuse.schedules.timing import makespan
from rlhfuse.timeline import Timeline

MOST_LAYOUTS = 4


@dataclass(frozen=True, slots=True)
class EarlyTraining:
    """`stats`: generation, inference, and forward and backward of every group; `layout`: its
    blocks are whole replicas of the actor; `train_token_s`: of a group, on one of them."""

    trained: Trained
    layout: RolloutLayout
    stats: Stats
    train_token_s: float
    migration: str

    @property
    def end_s(self) -> float:
        """Gradients exchanged, optimizer done."""
        return self.stats.end_s + self.trained.exchange_s


def best_early(
    config: Config,
    workload: Workload,
    cluster: Cluster,
    layouts: Sequence[Trained],
    chosen: RolloutLayout,
    most_samples: int,
) -> EarlyTraining | None:
    """The training layout with which early training ends a step soonest, by simulation, among the
    fastest for each number of devices in a replica; None where groups must be trained together."""
    if why_never(config):
        return None
    rated = []
    for trained in _one_per_size(layouts)[:MOST_LAYOUTS]:
        layout = _layout(config, workload, cluster, trained, chosen)
        if layout is not None:
            token_s = group_token_s(config, workload, cluster, trained)
            rated += [
                _simulated(config, workload, cluster, trained, layout, token_s, name, most_samples)
                for name in ("auto", "off")
            ]
    return min(rated, key=lambda early: early.end_s, default=None)


def _one_per_size(layouts: Sequence[Trained]) -> list[Trained]:
    """The fastest of each number of devices in a replica, the fastest first."""
    sizes: dict[int, Trained] = {}
    for trained in sorted(layouts, key=lambda t: t.time_s):
        sizes.setdefault(trained.parallel.tp * trained.parallel.pp, trained)
    return list(sizes.values())


def _layout(
    config: Config, workload: Workload, cluster: Cluster, trained: Trained, chosen: RolloutLayout
) -> RolloutLayout | None:
    """Instances as chosen, freed by whole replicas; None where they do not fit beside it, or where
    freed devices make up no replica before all are free."""
    asked = msgspec.structs.replace(
        config, plan=msgspec.structs.replace(config.plan, rollout_tp=chosen.tp)
    )
    found = ro.candidates(asked, workload, cluster, sum(trained.held_bytes))
    if not found:
        return None
    layout = found[0][0]
    devices = trained.parallel.tp * trained.parallel.pp
    block = max(layout.block, devices // layout.tp)
    if layout.instances % block or layout.instances < 2 * block:
        return None
    return msgspec.structs.replace(layout, block=block)


def group_token_s(config: Config, workload: Workload, cluster: Cluster, trained: Trained) -> float:
    """Seconds per token of one group, alone on one replica: its micro-batches, one after another
    through the replica's stages."""
    actor, parallel = config.actor, trained.parallel
    tokens = workload.per_prompt * workload.mean_total
    number = min(workload.per_prompt, -(-int(tokens) // actor.ppo_max_token_len_per_gpu))
    times = costs.stage_times(
        workload.models["actor"], "actor", cluster, parallel, tokens / number,
        workload.mean_total, recompute=actor.gradient_checkpointing,
    )  # fmt: skip
    pipeline = Pipeline.make("actor", range(parallel.pp), number, times.forward, times.backward)
    return makespan(serial(Problem(parallel.pp, (pipeline,), None, times.hop_s))) / tokens


def _simulated(
    config: Config, workload: Workload, cluster: Cluster, trained: Trained, layout: RolloutLayout,
    token_s: float, migration: str, most_samples: int,
) -> EarlyTraining:  # fmt: skip
    # Where a block holds several replicas, each of them has its group.
    together = max(1, layout.block * layout.tp // (trained.parallel.tp * trained.parallel.pp))
    early = EarlyTraining(trained, layout, Stats(0, 0, 0, 0, ()), token_s / together, migration)
    some, small = ro.sliced(workload, layout, most_samples)
    stats = simulated(config, some, small, cluster, early)[1]
    return replace(early, stats=stats)


def simulated(
    config: Config, workload: Workload, layout: RolloutLayout, cluster: Cluster,
    early: EarlyTraining, *, record: bool = False,
) -> tuple[Timeline, Stats]:  # fmt: skip
    """Generation, inference and training of groups on a (slice of a) cluster."""
    cost = costs.rollout_costs(
        workload.models, workload.scored, cluster, layout.tp, layout.block, workload.mean_total / 2
    )
    cost = replace(cost, score_token_s={**cost.score_token_s, TRAIN: early.train_token_s})
    policy = ro.policy_named(ro.policy_of(config, layout), early.migration)
    return ro.run(workload, layout, cost, policy, record=record, train=True)
