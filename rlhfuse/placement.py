"""Which pipeline stage sits on which device, and what a worker process is told at its start."""

from typing import Literal

import msgspec

from rlhfuse.config import Config


class StagePlacement(msgspec.Struct, frozen=True):
    """One role's training pipeline: `ranks[s]` runs pp_stage s, which holds the decoder layers
    from ``layers[s][0]`` up to, not including, ``layers[s][1]``."""

    ranks: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker process needs to know before its first command."""

    name: str  # "rollout-0", "training-1"
    kind: Literal["rollout", "training"]
    index: int  # device
    hub: str  # the controller's endpoint
    config: Config
    core: int | None  # CPU core to stay on
    pipelines: dict[str, StagePlacement]  # by role
    master_port: int  # where the training workers meet; 0 for rollout workers
    total_optimizer_steps: int


def pipeline_ranks(config: Config) -> dict[str, tuple[int, ...]]:
    """Ranks of each trained role's stages: the actor forwards from rank 0, the critic in reverse,
    so that one fills the other's bubbles (RLHFuse, arXiv 2409.13221).

    Raises:
        ValueError: more pipeline stages than devices.
    """
    devices = config.placement.num_devices
    sizes = {"actor": config.placement.actor_pp or devices}
    if config.uses_critic:
        sizes["critic"] = config.placement.critic_pp or devices
    for role, size in sizes.items():
        if size > devices:
            raise ValueError(
                f"placement.{role}_pp={size}: there are only {devices} devices "
                "(placement.num_devices)"
            )
    ranks = {"actor": tuple(range(sizes["actor"]))}
    if "critic" in sizes:
        ranks["critic"] = tuple(range(devices - 1, devices - 1 - sizes["critic"], -1))
    return ranks
