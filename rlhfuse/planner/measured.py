"""Prediction of a step as configured, from costs that were measured (or given) on this machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import msgspec

from rlhfuse.config import Config
from rlhfuse.cost import CostModel, fit
from rlhfuse.group_plan import plan_groups
from rlhfuse.group_training import trains_groups
from rlhfuse.placement import StagePlacement, roles_of
from rlhfuse.planner import rollout
from rlhfuse.planner.rollout import RolloutLayout
from rlhfuse.planner.step import Round, StageSeconds, joined
from rlhfuse.planner.workload import Workload
from rlhfuse.rollout.groups import with_training
from rlhfuse.schedules.timing import makespan, simulate
from rlhfuse.timeline import Kind, Timeline
from rlhfuse.update_plan import (
    StageCosts,
    TrainedSample,
    UpdatePlan,
    measured_costs,
    plan_update,
)


@dataclass(frozen=True, slots=True)
class StepCosts:
    """All that a step costs. `update_s`: of an update beside its mini-batches; `minibatch_s`: of
    a mini-batch beside its schedule; `weights_s`: from the last optimizer step to the next
    step's start; `origin`: where the numbers come from."""

    rollout: CostModel
    stages: Mapping[str, StageCosts]
    update_s: float
    minibatch_s: float
    weights_s: float
    origin: str


@dataclass(frozen=True, slots=True)
class StepPrediction:
    """Seconds by stage and a timeline of all devices, serial and fused."""

    serial: StageSeconds
    fused: StageSeconds
    serial_timeline: Timeline
    fused_timeline: Timeline


def predict(
    config: Config,
    workload: Workload,
    pipelines: Mapping[str, StagePlacement],
    costs: StepCosts,
    *,
    step: int = 1,
) -> StepPrediction:
    """The step with these samples on ``placement.num_devices`` devices, one instance on each."""
    off = without_fusion(config)
    serial_s, serial_line = predict_one(off, workload, pipelines, costs, step=step)
    fused_s, fused_line = predict_one(config, workload, pipelines, costs, step=step)
    return StepPrediction(serial_s, fused_s, serial_line, fused_line)


def without_fusion(config: Config) -> Config:
    """The serial baseline of the configuration."""
    fusion = msgspec.structs.replace(config.fusion, inter_stage="off", intra_stage="off")
    return msgspec.structs.replace(config, fusion=fusion)


def predict_one(
    config: Config,
    workload: Workload,
    pipelines: Mapping[str, StagePlacement],
    costs: StepCosts,
    *,
    step: int,
) -> tuple[StageSeconds, Timeline]:
    """With the fusions that `config` says."""
    devices = config.placement.num_devices
    room = config.data.max_prompt_length + config.rollout.response_length
    layout = RolloutLayout(1, devices, 1, config.rollout.max_num_seqs * room)
    allowed = rollout.policy_of(config, layout)
    overlap = config.fusion.inter_stage != "off"
    migration = config.fusion.migration if overlap else "serial"
    ahead = overlap and trains_groups(config)
    line, stats = rollout.run(
        workload,
        layout,
        with_training(costs.rollout, costs.stages["actor"]),
        rollout.policy_named(allowed, migration),
        record=True,
        train=ahead,
    )
    plan = _update(config, workload, pipelines, costs, step, trained=ahead)
    rounds = [
        # The optimizers step once, after the last schedule of the mini-batch.
        Round(
            simulate(schedule),
            makespan(schedule),
            costs.minibatch_s if schedule is batch.rounds[-1] else 0.0,
        )
        for batch in plan.minibatches
        for schedule in batch.rounds
    ]
    start_s = stats.end_s + costs.update_s
    timeline = joined(line, start_s, rounds, costs.weights_s, lambda i: (f"rank{i}", i), devices)
    training = costs.update_s + sum(r.makespan_s + r.exchange_s for r in rounds)
    after_s = stats.end_s - stats.generation_s  # scoring, or training and some scoring within
    if ahead:
        training, after_s = training + after_s + costs.minibatch_s, 0.0
    return StageSeconds(stats.generation_s, after_s, training, costs.weights_s), timeline


def _update(
    config: Config,
    workload: Workload,
    pipelines: Mapping[str, StagePlacement],
    costs: StepCosts,
    step: int,
    *,
    trained: bool,
) -> UpdatePlan:
    samples = [
        TrainedSample(i, i // workload.per_prompt, length + prompt)
        for i, (length, prompt) in enumerate(zip(workload.lengths, workload.prompts, strict=True))
    ]
    if trains_groups(config):
        return plan_groups(config, [] if trained else samples, pipelines, costs.stages)
    return plan_update(
        config,
        samples,
        pipelines,
        costs.stages,
        roles=roles_of(pipelines),
        fused=config.fusion.intra_stage != "off",
        step=step,
    )


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    """What one step of a run left behind. `tokens`: of all its samples, prompts included."""

    timeline: Timeline
    tokens: int
    update_s: float
    weights_s: float


def fit_step_costs(
    config: Config, steps: Sequence[MeasuredStep], previous: StepCosts, origin: str
) -> StepCosts:
    """`previous` with everything replaced that the steps have measurements for."""
    spans = tuple(span for step in steps for span in step.timeline.spans)
    tokens = sum(step.tokens for step in steps)
    trained = {
        role: tokens * (config.actor if role == "actor" else config.critic).ppo_epochs
        for role in previous.stages
    }
    rounds = [_round_times(step.timeline) for step in steps]
    gaps = [
        b[0] - a[1] for times in rounds for a, b in pairwise(times)
    ]  # barrier, norms, optimizer, the next order
    between_s = median(gaps) if gaps else previous.minibatch_s
    fixed = [
        max(0.0, step.update_s - sum(end - start + between_s for start, end in times))
        for step, times in zip(steps, rounds, strict=True)
        if times
    ]
    return StepCosts(
        rollout=fit(Timeline(spans), previous.rollout),
        stages=measured_costs(spans, trained, previous.stages),
        update_s=median(fixed) if fixed else previous.update_s,
        minibatch_s=between_s,
        weights_s=median(step.weights_s for step in steps),
        origin=origin,
    )


def other_fusions(
    config: Config,
    workload: Workload,
    pipelines: Mapping[str, StagePlacement],
    ran: Config,
    measured: MeasuredStep,
    previous: StepCosts,
    *,
    step: int,
) -> tuple[float, float]:
    """What a measured step would have taken with the fusions of `config` instead of those of
    `ran`: seconds saved, and the simulation of what ran over what was measured.

    The costs are the step's own, the samples the same; the scheduler that runs such steps
    simulates both, and the search that orders their updates orders both. What the simulation
    misses is assumed to stay as it was.
    """
    costs = fit_step_costs(config, [measured], previous, "the step")
    before, _ = predict_one(ran, workload, pipelines, costs, step=step)
    after, _ = predict_one(config, workload, pipelines, costs, step=step)
    return before.step - after.step, before.step / measured.timeline.wall_s


def _round_times(timeline: Timeline) -> list[tuple[float, float]]:
    """(first task's start, last task's end) of every mini-batch, in order."""
    found: dict[int, tuple[float, float]] = {}
    for span in timeline.of_kinds((Kind.F, Kind.B, Kind.I, Kind.W)).spans:
        number = span.args.get("round")
        if isinstance(number, int):
            start_s, end_s = found.get(number, (span.start_s, span.end_s))
            found[number] = (min(start_s, span.start_s), max(end_s, span.end_s))
    return [found[number] for number in sorted(found)]
