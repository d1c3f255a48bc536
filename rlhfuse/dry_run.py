"""What a run would do, before anything starts: arithmetic, placement, predicted step."""

import math
from collections.abc import Sequence
from dataclasses import replace

import msgspec
import torch

from rlhfuse.batch_sizes import batch_arithmetic
from rlhfuse.config import Config
from rlhfuse.group_training import trains_groups, why_groups_wait
from rlhfuse.logprob_sources import ratios, why_reference_stays
from rlhfuse.placement import Seat, StagePlacement
from rlhfuse.planner.measured import StepCosts, predict, predict_one
from rlhfuse.planner.memory import DeviceMemory, check_room, memory_plan
from rlhfuse.planner.step import LEGEND, bubbles, drawn
from rlhfuse.planner.summary import Pair, StagePair, stage_pairs
from rlhfuse.planner.training_memory import GIB
from rlhfuse.planner.workload import Workload, workload_of
from rlhfuse.resolve import Resolved
from rlhfuse.run_costs import step_costs


class DryRun(msgspec.Struct, frozen=True, kw_only=True):
    """`reference`: where its log-probabilities come from (empty: there are none). `ratios`: which
    distributions they compare (empty: whole ones).
    `early_training`: whether groups are trained while others generate (empty: there is a critic).
    `update_ratio`: predicted serial over fused time of one update. `step_s`, `stages` and `bubble`
    (parts of device time, by cause) are predicted from `costs_from`; `timeline` is drawn in
    letters, serial and fused. `memory_bytes`: planned for the fullest device; `memory`: its parts
    in GiB; `refused`: why this machine is too small (empty: it is not, or others will run it)."""

    total_steps: int
    num_prompts: int
    arithmetic: tuple[str, ...]
    pipelines: dict[str, StagePlacement]
    scored_roles: tuple[str, ...]
    reference: str
    ratios: str
    early_training: str
    update_ratio: float
    step_s: Pair
    stages: dict[str, StagePair]
    bubble: dict[str, float]
    timeline: dict[str, list[str]]
    memory_bytes: int
    memory: str
    refused: str
    costs_from: str
    assumed: str

    def text(self) -> str:
        """For a terminal."""
        lines = ["Batch arithmetic", *(f"  {line}" for line in self.arithmetic), "Placement"]
        for role, pipeline in self.pipelines.items():
            stages = ", ".join(
                f"rank {rank}: layers {first}-{end - 1}"
                for rank, (first, end) in zip(pipeline.ranks, pipeline.layers, strict=True)
            )
            lines.append(f"  {role} pipeline: {stages}")
        lines.append(f"  scored on rollout workers: {', '.join(self.scored_roles) or 'nothing'}")
        lines += [f"  reference log-probabilities: {self.reference}"] if self.reference else []
        lines += [f"  ratios: {self.ratios}"] if self.ratios else []
        lines += [f"  early training: {self.early_training}"] if self.early_training else []
        most = self.memory_bytes / GIB
        lines += ["Memory", f"  {most:.3g} GiB on the fullest device: {self.memory}"]
        lines += [f"  would be refused here: {self.refused}"] if self.refused else []
        return "\n".join([*lines, *self._predicted()])

    def _predicted(self) -> list[str]:
        step = self.step_s
        lines = [
            "Predicted step (a prediction, nothing ran)",
            f"  costs: {self.costs_from}",
            f"  lengths: {self.assumed}",
            f"  {step.fused:.3g} s as configured, {step.serial:.3g} s serial: "
            f"{step.serial / step.fused:.2f} times as fast; "
            f"one update: {self.update_ratio:.2f} times as fast",
            f"  {'':<12}{'serial s':>10}{'fused s':>10}",
        ]
        for name, pair in self.stages.items():
            lines.append(f"  {name:<12}{pair.serial_s:>10.3g}{pair.fused_s:>10.3g}")
        idle = ", ".join(f"{name} {part:.1%}" for name, part in [*self.bubble.items()][:4])
        lines.append(f"  not computing when fused: {idle or 'nothing'}")
        for name, rows in self.timeline.items():
            lines += [f"  {name}", *rows]
        return [*lines, f"  {LEGEND}"]


def describe(run: Resolved) -> DryRun:
    """Plan and predict a typical step. Nothing is measured, nothing starts."""
    config = run.config
    workload = _workload(run, config)
    costs, metrics = step_costs(run, workload)
    if "response_length/p99" in metrics and not config.plan.response_median:
        # The earlier run's responses say more than any default.
        workload = _workload(run, _with_lengths_of(config, metrics))
    found = predict(config, workload, run.pipelines, costs)
    cuda = config.placement.device != "cpu" and torch.cuda.is_available()
    plan = memory_plan(config, workload, run.pipelines, cuda=cuda, reference=run.reference)
    fullest = max(plan, key=lambda device: device.total)
    wall_s = max(found.serial_timeline.end_s, found.fused_timeline.end_s)
    return DryRun(
        total_steps=run.total_steps,
        num_prompts=len(run.prompts),
        arithmetic=tuple(batch_arithmetic(config, len(run.prompts))),
        pipelines=run.pipelines,
        scored_roles=config.scored_roles,
        reference=_reference(config),
        ratios=ratios(config),
        early_training=_early_training(run, workload, costs),
        update_ratio=found.serial.training / found.fused.training,
        step_s=Pair(found.serial.step, found.fused.step),
        stages=stage_pairs(found.serial, found.fused),
        bubble=bubbles(found.fused_timeline),
        timeline={
            "serial": drawn(found.serial_timeline, wall_s),
            "as configured": drawn(found.fused_timeline, wall_s),
        },
        memory_bytes=fullest.total,
        memory=fullest.text(),
        refused=_refusal(config, plan, cuda=cuda),
        costs_from=costs.origin,
        assumed=workload.described,
    )


def _refusal(config: Config, plan: Sequence[DeviceMemory], *, cuda: bool) -> str:
    """What a run on this machine would end with."""
    from rlhfuse.cluster import describe_node  # imports Ray, which takes a second

    if config.placement.ray_address:
        return ""
    here = describe_node("", "127.0.0.1")
    try:
        check_room(plan, [Seat(here, index, None) for index in range(len(plan))], cuda=cuda)
    except ValueError as error:
        return str(error).removeprefix("memory: ")
    return ""


def _reference(config: Config) -> str:
    """Where reference log-probabilities are computed, and why."""
    if not config.uses_reference:
        return ""
    reason = why_reference_stays(config)
    if reason:
        return f"on rollout workers, before the update: {reason}"
    return (
        "of the first mini-batch on rollout workers; of each later one within the update before "
        "it, in the actor's bubbles (fusion.reference)"
    )


def _early_training(run: Resolved, workload: Workload, costs: StepCosts) -> str:
    """Whether groups are trained while others generate, what that should gain, or why not."""
    config = run.config
    reason = why_groups_wait(config)
    if config.uses_critic:
        return ""
    if reason:
        return f"none: {reason}"
    if config.fusion.inter_stage == "off":
        return "none: fusion.inter_stage is off"
    replace_ = msgspec.structs.replace
    step_s = []
    for switch in ("off", "on"):
        fusion = replace_(config.fusion, early_training=switch)
        changed = replace_(config, fusion=fusion)
        step_s.append(predict_one(changed, workload, run.pipelines, costs, step=1)[0].step)
    without_s, with_s = step_s
    gain = f"{max(0.0, 1 - with_s / without_s):.1%} of the step, as predicted"
    if trains_groups(config):
        return (
            f"complete groups, on devices that have nothing left to generate: saves {gain}; to the "
            "bits of a serial step of this configuration (fusion.early_training)"
        )
    return f"off; possible here, and would save {gain} (fusion.early_training=auto)"


def _workload(run: Resolved, config: Config) -> Workload:
    """The step with the run's own prompts."""
    made = workload_of(config)
    prompts = [len(prompt.tokens) for prompt in run.prompts[: config.data.train_batch_size]]
    count = [prompts[(i // config.rollout.n) % len(prompts)] for i in range(made.num_samples)]
    return replace(made, prompts=tuple(count))


def _with_lengths_of(config: Config, metrics: dict[str, float]) -> Config:
    """The lognormal distribution with the median and the 99th percentile of a measured step."""
    middle = max(1.0, metrics["response_length/median"])
    high = max(middle * 1.05, metrics["response_length/p99"])
    plan = msgspec.structs.replace(
        config.plan,
        response_median=round(middle),
        response_sigma=math.log(high / middle) / 2.326,
    )
    return msgspec.structs.replace(config, plan=plan)
