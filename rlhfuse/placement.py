"""Which pipeline stage sits on which device, which device on which machine, and what a worker
process is told at its start.

A trained role is one *pipeline*, or several equal ones: its data-parallel replicas. Pipelines are
named by their role, and from the second replica on by role and number: ``actor``, ``actor.1``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import msgspec

from rlhfuse.config import Config


class StagePlacement(msgspec.Struct, frozen=True):
    """One training pipeline: `ranks[s]` runs pp_stage s, which holds the decoder layers
    from ``layers[s][0]`` up to, not including, ``layers[s][1]``.

    A rank here is a row of the schedule: one device or, with tensor parallelism, `placement.tp`
    devices with neighbouring numbers that do the same tasks together.
    """

    ranks: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]


class RunKeys(msgspec.Struct, frozen=True):
    """By what the processes of one run know each other. `token` begins every message;
    `public` and `secret` are a CURVE key pair (Z85 text), empty where all run on one machine."""

    token: bytes
    public: str = ""
    secret: str = ""


class NodeInfo(msgspec.Struct, frozen=True):
    """A Ray node: `address` is what other nodes reach it by, `machine` the same for nodes that
    share processor cores. Memory that this run may have and that is free now, and the memory of
    the smallest GPU, in bytes; 0 where it is not known."""

    node_id: str
    address: str
    machine: str
    cores: tuple[int, ...]
    num_gpus: int = 0
    memory_bytes: int = 0
    free_bytes: int = 0
    gpu_bytes: int = 0


class Seat(msgspec.Struct, frozen=True):
    """A device of the run: on which node, as which of the node's devices, on which core."""

    node: NodeInfo
    local_index: int
    core: int | None


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker process needs to know before its first command."""

    name: str  # "rollout-0", "training-1"
    kind: Literal["rollout", "training"]
    index: int  # device
    seat: Seat
    hub: str  # the controller's endpoint
    keys: RunKeys
    config: Config
    pipelines: dict[str, StagePlacement]  # by name
    reference: dict[str, StagePlacement] = {}  # forward-only pipelines, by name
    store: tuple[str, int]  # host and port where the training workers meet
    total_optimizer_steps: int
    incarnation: int = 0  # counts the processes that have been this worker

    @property
    def identity(self) -> str:
        """Names this process, and none before or after it."""
        return f"{self.name}#{self.incarnation}"


def seats(num_devices: int, nodes: Sequence[NodeInfo], *, gpus: bool, pin: bool) -> list[Seat]:
    """Devices over nodes, neighbours together: by GPUs where `gpus`, else evenly. A core of its
    own for each device where `pin` and its machine has enough, else none.

    Raises:
        ValueError: there are fewer GPUs than devices.
    """
    share = -(-num_devices // len(nodes))
    room = [node.num_gpus if gpus else share for node in nodes]
    if sum(room) < num_devices:
        raise ValueError(
            f"placement.num_devices={num_devices}: the cluster has {sum(room)} GPUs on "
            f"{len(nodes)} nodes"
        )
    homes = [(node, i) for node, size in zip(nodes, room, strict=True) for i in range(size)]
    homes = homes[:num_devices]
    wanted = Counter(node.machine for node, _ in homes)
    taken: Counter[str] = Counter()
    found = []
    for node, local_index in homes:
        core = None
        if pin and len(node.cores) >= wanted[node.machine]:
            core = node.cores[taken[node.machine]]
            taken[node.machine] += 1
        found.append(Seat(node, local_index, core))
    return found


def pipeline_name(role: str, replica: int) -> str:
    """``actor`` for replica 0, then ``actor.1`` and so on."""
    return f"{role}.{replica}" if replica else role


def role_of(pipeline: str) -> str:
    """The role of a pipeline's name."""
    return pipeline.partition(".")[0]


def replica_of(pipeline: str) -> int:
    """Which data-parallel replica of its role a pipeline's name means."""
    return int(pipeline.partition(".")[2] or 0)


def roles_of(pipelines: Iterable[str]) -> tuple[str, ...]:
    """The roles of some pipelines, each once, in order."""
    return tuple(dict.fromkeys(role_of(name) for name in pipelines))


def replicas(pipelines: Iterable[str], role: str) -> tuple[str, ...]:
    """The names of a role's pipelines, by replica."""
    return tuple(sorted((p for p in pipelines if role_of(p) == role), key=replica_of))


def reference_ranks(actor: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Ranks of the reference's forward-only pipelines: each replica of the actor has one, in
    reverse, as a critic would be."""
    return {
        pipeline_name("reference", replica_of(name)): ranks[::-1]
        for name, ranks in actor.items()
        if role_of(name) == "actor"
    }


def num_rows(config: Config) -> int:
    """Rows of the training schedules: devices, or groups of tensor-parallel ones."""
    return config.placement.num_devices // config.placement.tp


def pipeline_ranks(config: Config) -> dict[str, tuple[int, ...]]:
    """Ranks of each pipeline's stages. Replica k of a role of p stages fills ranks k p and up: the
    actor's forwards, the critic's in reverse, so that one fills the other's bubbles (RLHFuse,
    arXiv 2409.13221).

    Raises:
        ValueError: the stages of a role do not divide the devices.
    """
    devices = num_rows(config)
    sizes = {"actor": config.placement.actor_pp or devices}
    if config.uses_critic:
        sizes["critic"] = config.placement.critic_pp or devices
    ranks = {}
    for role, size in sizes.items():
        if devices % size:
            raise ValueError(
                f"placement.{role}_pp={size}: does not divide {devices} devices "
                "(placement.num_devices / placement.tp)"
            )
        for replica in range(devices // size):
            block = tuple(range(replica * size, (replica + 1) * size))
            name = pipeline_name(role, replica)
            ranks[name] = block if role == "actor" else block[::-1]
    return ranks
