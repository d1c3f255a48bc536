"""What a PPO update runs and in which order: mini-batches, micro-batches, schedules. Pure.

Which samples form a micro-batch depends on their ids and lengths alone. Measured costs shape only
the schedule, and no schedule changes what is computed: gradients accumulate in micro-batch order.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import msgspec

from rlhfuse import packing
from rlhfuse.config import Config, TrainedModelConfig
from rlhfuse.messages import MiniBatch, SampleIds
from rlhfuse.placement import (
    StagePlacement,
    num_rows,
    pipeline_name,
    replica_of,
    replicas,
    role_of,
    roles_of,
)
from rlhfuse.schedules.fused import fuse
from rlhfuse.schedules.ir import Pipeline, Problem, Schedule, Task
from rlhfuse.schedules.standard import one_f_one_b
from rlhfuse.schedules.timing import makespan
from rlhfuse.timeline import Kind, Span

SEARCH_ITERATIONS = 200

ScheduleSearch = Callable[[Problem], Schedule]


@dataclass(frozen=True, slots=True)
class TrainedSample:
    """`group`: index of its prompt; `tokens`: prompt and response."""

    id: int
    group: int
    tokens: int


class StageCosts(msgspec.Struct, frozen=True):
    """Seconds per token of each pp_stage of one role, forward and backward; `weight` is the part
    of backward that may be split off."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]

    def weight_part(self, stage: int) -> float:
        """The share of a backward pass that W takes."""
        return self.weight[stage] / self.backward[stage] if self.backward[stage] else 0.0


def forward_only(forward: Sequence[float]) -> StageCosts:
    """Costs of a pipeline that never runs backward."""
    nothing = (0.0,) * len(forward)
    return StageCosts(tuple(forward), nothing, nothing)


@dataclass(frozen=True, slots=True)
class UpdatePlan:
    """`predicted_s` by the schedules' own timing; `serial_s`: the same work model after model."""

    minibatches: tuple[MiniBatch, ...]
    predicted_s: float
    serial_s: float

    @property
    def forward_samples(self) -> tuple[int, ...]:
        """Samples that the reference's pipelines run over."""
        found = (ids for batch in self.minibatches for ids in batch.forward.values())
        return tuple(i for microbatches in found for ids in microbatches for i in ids)

    @property
    def num_microbatches(self) -> int:
        """Trained, of all mini-batches and pipelines."""
        return sum(len(ids) for batch in self.minibatches for ids in batch.microbatches.values())


def later_samples(config: Config, samples: Iterable[tuple[int, int]], step: int) -> frozenset[int]:
    """Those of the (id, group) pairs that the actor does not train on in its first mini-batch."""
    _, *later = packing.minibatches(
        list(samples),
        prompts_per_minibatch=config.actor.ppo_mini_batch_size,
        seed=_order_seed(step, 0),
    )
    return frozenset(i for ids in later for i in ids)


def plan_update(
    config: Config,
    samples: Sequence[TrainedSample],
    pipelines: Mapping[str, StagePlacement],
    costs: Mapping[str, StageCosts],
    *,
    roles: Sequence[str],
    fused: bool,
    step: int,
    reference: Mapping[str, StagePlacement] | None = None,
    search: ScheduleSearch | None = None,
) -> UpdatePlan:
    """Every sample once per role and epoch; mini-batch k of the actor runs with mini-batch k of
    the critic, and what one of them has more runs alone. Replicas of a role share its samples, by
    their lengths. With the pipelines of a `reference`, mini-batch k of the first epoch runs with
    the reference's forward passes over mini-batch k + 1. `search` finds fused schedules; by default
    one that is bounded by work and not by time, so that it gives the same answer in every run."""
    tokens = {sample.id: sample.tokens for sample in samples}
    cut = {
        role: _cut(_model(config, role), samples, tokens, step, replicas(pipelines, role))
        for role in roles
    }
    minibatches: list[MiniBatch] = []
    predicted_s = serial_s = 0.0
    placed = {**pipelines, **(reference or {})}
    for number, parts in enumerate(zip_longest(*cut.values())):
        mine = {name: ids for part in parts if part is not None for name, ids in part.items()}
        forward = _forward(config, cut["actor"], number) if reference else {}
        both = {**mine, **forward}
        problem = make_problem(both, tokens, placed, costs, num_rows(config))
        present = roles_of(both)
        serial = tuple(one_f_one_b(_only(problem, replicas(both, role))) for role in present)
        rounds = serial
        serial_time = sum(makespan(schedule) for schedule in serial)
        if fused and len(present) > 1:
            rounds = (_fused(problem, search or _same_every_time(config)),)
        minibatches.append(MiniBatch(mine, rounds, forward))
        serial_s += serial_time
        predicted_s += sum(makespan(schedule) for schedule in rounds)
    return UpdatePlan(tuple(minibatches), predicted_s, serial_s)


def rebuilding_gain(
    config: Config,
    batch: MiniBatch,
    samples: Sequence[TrainedSample],
    pipelines: Mapping[str, StagePlacement],
    first: Mapping[str, StageCosts],
) -> float:
    """What measuring costs has gained: the predicted time of the schedule that the `first` costs
    lead to, over that of the schedule in use, both with the costs that the latter was made for.
    1 where a mini-batch runs serially."""
    (schedule, *others) = batch.rounds
    if others or len(schedule.problem.pipelines) < 2:
        return 1.0
    tokens = {sample.id: sample.tokens for sample in samples}
    both = {**batch.microbatches, **batch.forward}
    before = make_problem(both, tokens, pipelines, first, config.placement.num_devices)
    old = _fused(before, _same_every_time(config))
    return makespan(Schedule(schedule.problem, old.rows)) / makespan(schedule)


def _forward(
    config: Config, cut: Sequence[Mapping[str, tuple[SampleIds, ...]]], number: int
) -> dict[str, tuple[SampleIds, ...]]:
    """The reference's micro-batches beside mini-batch `number`: the actor's of the next one."""
    following = number + 1
    if following >= len(cut) // config.actor.ppo_epochs:  # all of the first epoch are known
        return {}
    return {
        pipeline_name("reference", replica_of(name)): ids for name, ids in cut[following].items()
    }


def _same_every_time(config: Config) -> ScheduleSearch:
    def search(problem: Problem) -> Schedule:
        split = config.fusion.split_weight
        return fuse(problem, iterations=SEARCH_ITERATIONS, split_weight=split)

    return search


def _fused(problem: Problem, search: ScheduleSearch) -> Schedule:
    """Blocks of ranks that share no pipeline are searched one by one, and run side by side."""
    rows: list[tuple[Task, ...]] = [()] * problem.num_ranks
    for names in _blocks(problem):
        found = search(_only(problem, names))
        for rank, row in enumerate(found.rows):
            rows[rank] = row or rows[rank]
    return Schedule(problem, tuple(rows))


def _blocks(problem: Problem) -> list[tuple[str, ...]]:
    """Pipelines that meet on some rank, directly or over others, together."""
    blocks: list[tuple[set[int], tuple[str, ...]]] = []
    for pipeline in problem.pipelines:
        ranks = set(pipeline.stages)
        names: tuple[str, ...] = (pipeline.name,)
        apart = []
        for other_ranks, other_names in blocks:
            if ranks & other_ranks:
                ranks, names = ranks | other_ranks, other_names + names
            else:
                apart.append((other_ranks, other_names))
        blocks = [*apart, (ranks, names)]
    return [names for _, names in blocks]


def make_problem(
    microbatches: Mapping[str, tuple[SampleIds, ...]],
    tokens: Mapping[int, int],
    pipelines: Mapping[str, StagePlacement],
    costs: Mapping[str, StageCosts],
    num_ranks: int,
) -> Problem:
    """The pipelines of one mini-batch, which `microbatches` names; a micro-batch weighs as many
    tokens as it has."""
    made = []
    for name, batches in microbatches.items():
        sizes = [sum(tokens[i] for i in batch) for batch in batches]
        mean = sum(sizes) / len(sizes)
        cost = costs[role_of(name)]
        made.append(
            Pipeline.make(
                name,
                pipelines[name].ranks,
                len(batches),
                [c * mean for c in cost.forward],
                [c * mean for c in cost.backward],
                weight=[c * mean for c in cost.weight],
                activation=mean,
                microbatch_weights=[size / mean for size in sizes],
            )
        )
    return Problem(num_ranks, tuple(made))


def measured_costs(
    spans: Sequence[Span], tokens: Mapping[str, int], previous: Mapping[str, StageCosts]
) -> dict[str, StageCosts]:
    """Seconds per token from the task spans of one update; `tokens`: trained per role, every
    epoch counted. A stage or operation that did not run keeps its previous cost."""
    seconds: dict[tuple[str, int, Kind], float] = defaultdict(float)
    for span in spans:
        if span.kind in (Kind.F, Kind.B, Kind.I, Kind.W):
            task = Task.parse(span.name)
            seconds[role_of(task.pipeline), task.pp_stage, span.kind] += span.duration_s
    costs = dict(previous)
    for role, old in previous.items():
        if not tokens.get(role):
            continue

        def per_token(stage: int, *kinds: Kind, role: str = role) -> float:
            return sum(seconds[role, stage, kind] for kind in kinds) / tokens[role]

        stages = range(len(old.forward))
        backward = [per_token(s, Kind.B, Kind.I, Kind.W) or old.backward[s] for s in stages]
        # Where nothing was split, the part of W in a backward pass stays what it was.
        parts = [per_token(s, Kind.W) or backward[s] * old.weight_part(s) for s in stages]
        costs[role] = StageCosts(
            forward=tuple(per_token(s, Kind.F) or old.forward[s] for s in stages),
            backward=tuple(backward),
            weight=tuple(parts),
        )
    return costs


def _cut(
    model: TrainedModelConfig,
    samples: Sequence[TrainedSample],
    tokens: Mapping[int, int],
    step: int,
    pipelines: Sequence[str],
) -> list[dict[str, tuple[SampleIds, ...]]]:
    """Micro-batches of every mini-batch of every epoch of one role, by pipeline."""
    cut = []
    for epoch in range(model.ppo_epochs):
        for ids in packing.minibatches(
            [(s.id, s.group) for s in samples],
            prompts_per_minibatch=model.ppo_mini_batch_size,
            seed=_order_seed(step, epoch),
        ):
            parts = packing.balanced([(i, tokens[i]) for i in ids], len(pipelines))
            cut.append(
                {
                    name: _microbatches(model, [(i, tokens[i]) for i in part])
                    for name, part in zip(pipelines, parts, strict=True)
                }
            )
    return cut


def _order_seed(step: int, epoch: int) -> int:
    """Of the order in which an epoch goes through its prompts."""
    return step * 1000 + epoch


def _microbatches(
    model: TrainedModelConfig, members: Sequence[tuple[int, int]]
) -> tuple[SampleIds, ...]:
    if model.num_microbatches:
        # A replica may have got few long samples.
        count = min(model.num_microbatches, len(members))
        return packing.microbatches(members, num_microbatches=count)
    return packing.microbatches(
        members,
        token_budget=model.ppo_max_token_len_per_gpu,
        padded=not model.use_remove_padding,
    )


def _model(config: Config, role: str) -> TrainedModelConfig:
    return config.actor if role == "actor" else config.critic


def _only(problem: Problem, names: Sequence[str]) -> Problem:
    pipelines = tuple(problem.pipeline(name) for name in names)
    return Problem(problem.num_ranks, pipelines, problem.memory_cap)
