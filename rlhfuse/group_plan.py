"""Training of groups one by one (`group_training`): which micro-batches, on which replica. Pure.

A group's micro-batches depend on its own samples' ids and lengths alone. On which replica they run,
and in which order, changes no bit: sums of gradients are such that no order shows.
"""

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence

from rlhfuse import packing
from rlhfuse.config import Config
from rlhfuse.messages import MiniBatch, SampleIds
from rlhfuse.placement import StagePlacement, num_rows, pipeline_name, replicas
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import makespan
from rlhfuse.update_plan import StageCosts, TrainedSample, UpdatePlan, make_problem


def plan_group(
    config: Config,
    group: Sequence[TrainedSample],
    replica: int,
    pipelines: Mapping[str, StagePlacement],
    costs: Mapping[str, StageCosts],
) -> MiniBatch:
    """One complete group on one replica."""
    cut = {pipeline_name("actor", replica): _microbatches(config, group)}
    return _minibatch(config, cut, group, pipelines, costs)


def plan_groups(
    config: Config,
    samples: Sequence[TrainedSample],
    pipelines: Mapping[str, StagePlacement],
    costs: Mapping[str, StageCosts],
) -> UpdatePlan:
    """The one optimizer step, and the groups that were not trained before: the largest first, each
    on the replica that has the least to do."""
    members: defaultdict[int, list[TrainedSample]] = defaultdict(list)
    for sample in samples:
        members[sample.group].append(sample)
    sizes = {number: sum(s.tokens for s in group) for number, group in members.items()}
    loads = [(0, name) for name in sorted(replicas(pipelines, "actor"))]
    cut: dict[str, tuple[SampleIds, ...]] = {}
    for number in sorted(members, key=lambda number: (-sizes[number], number)):
        load, name = loads[0]
        heapq.heapreplace(loads, (load + sizes[number], name))
        cut[name] = cut.get(name, ()) + _microbatches(config, members[number])
    batch = _minibatch(config, cut, samples, pipelines, costs)
    seconds = sum(makespan(schedule) for schedule in batch.rounds)
    return UpdatePlan((batch,), seconds, seconds)


def _microbatches(config: Config, group: Sequence[TrainedSample]) -> tuple[SampleIds, ...]:
    return packing.microbatches(
        [(sample.id, sample.tokens) for sample in group],
        token_budget=config.actor.ppo_max_token_len_per_gpu,
        padded=not config.actor.use_remove_padding,
    )


def _minibatch(
    config: Config,
    cut: Mapping[str, tuple[SampleIds, ...]],
    samples: Sequence[TrainedSample],
    pipelines: Mapping[str, StagePlacement],
    costs: Mapping[str, StageCosts],
) -> MiniBatch:
    if not cut:
        return MiniBatch({}, ())
    tokens = {sample.id: sample.tokens for sample in samples}
    problem = make_problem(cut, tokens, pipelines, costs, num_rows(config))
    return MiniBatch(dict(cut), (one_f_one_b(problem),))
