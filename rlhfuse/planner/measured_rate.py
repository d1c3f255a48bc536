"""The part of the devices' peak that training was seen to reach: from measured costs to a plan."""

from collections.abc import Sequence
from dataclasses import replace

from rlhfuse.config import Config
from rlhfuse.hardware import Cluster
from rlhfuse.placement import role_of
from rlhfuse.planner import costs
from rlhfuse.planner.costs import Parallel
from rlhfuse.planner.workload import Workload
from rlhfuse.schedules.ir import Pipeline, Problem


def with_measured_training(
    config: Config, workload: Workload, cluster: Cluster, problem: Problem
) -> Cluster:
    """The cluster with the training efficiency that `problem` (``rlhfuse profile --costs``) shows.

    The problem must be of one mini-batch of this configuration on such devices: its pipelines are
    held against what these models would take in the same layout (tensor parallel sizes as in the
    plan section, else 1). A single pipeline of any name is the actor's.

    Raises:
        ValueError: no pipeline is of a model that is trained here, it has more stages than the
            model has layers, or it would be faster than the devices can be.
    """
    by_role: dict[str, list[Pipeline]] = {}
    for pipe in problem.pipelines:
        role = "actor" if len(problem.pipelines) == 1 else role_of(pipe.name)
        if role in workload.trained:
            by_role.setdefault(role, []).append(pipe)
    if not by_role:
        names = ", ".join(pipe.name for pipe in problem.pipelines)
        raise ValueError(
            f"--costs: pipelines {names} are none of {', '.join(workload.trained)}; name them so"
        )
    measured_s = sum(_seconds(pipe) for pipes in by_role.values() for pipe in pipes)
    described_s = sum(
        _described_s(config, workload, cluster, role, pipes) for role, pipes in by_role.items()
    )
    efficiency = cluster.device.efficiency
    reached = efficiency.train * described_s / measured_s
    if not 0.001 < reached <= 1.0:
        raise ValueError(
            f"--costs: training would reach {reached:.2%} of the peak of {cluster.device.name}; "
            f"the file must be of one mini-batch of this configuration (actor.path, "
            f"ppo_mini_batch_size, lengths) on such devices, in seconds"
        )
    source = f"{cluster.device.source}; but training at {reached:.1%} of the peak was measured"
    device = replace(cluster.device, efficiency=replace(efficiency, train=reached), source=source)
    return replace(cluster, device=device)


def _seconds(pipe: Pipeline) -> float:
    """Of all stages and micro-batches."""
    return sum(pipe.microbatch_weights) * (sum(pipe.forward) + sum(pipe.backward))


def _described_s(
    config: Config, workload: Workload, cluster: Cluster, role: str, pipes: Sequence[Pipeline]
) -> float:
    """What the hardware's data say of the same work."""
    actor = role == "actor"
    tp = (config.plan.actor_tp if actor else config.plan.critic_tp) or 1
    model, trained = workload.models[role], config.actor if actor else config.critic
    total_s = 0.0
    for pipe in pipes:
        if pipe.num_stages > model.num_layers:
            raise ValueError(
                f"--costs: pipeline {pipe.name} has {pipe.num_stages} stages, {role}.path "
                f"{model.name} only {model.num_layers} layers: they are of another model"
            )
        tokens = workload.tokens_per_minibatch / len(pipes) / pipe.num_microbatches
        times = costs.stage_times(
            model, role, cluster, Parallel(tp, pipe.num_stages, len(pipes)), tokens,
            workload.mean_total, recompute=trained.gradient_checkpointing,
        )  # fmt: skip
        total_s += pipe.num_microbatches * (sum(times.forward) + sum(times.backward))
    return total_s
