"""What a run holds in memory, by device, before anything starts.

A device is shared by a rollout and a training worker. Weights, gradients and optimizer states are
there always; keys and values, scoring and training take turns, where instances sleep between.
Activations and logits are estimates for a typical step, all else is counted.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhfuse.config import Config, TrainedModelConfig
from rlhfuse.group_training import trains_groups
from rlhfuse.model_shape import ModelShape
from rlhfuse.placement import Seat, StagePlacement, replicas, role_of
from rlhfuse.planner.costs import KEPT_VALUES, USABLE
from rlhfuse.planner.training_memory import (
    GIB,
    TRAINING_PROGRAM_BYTES,
    kept_values,
    passing_values,
    stage_bytes,
    stage_parameters,
    trained_model,
)
from rlhfuse.planner.workload import Workload

# Libraries, code and buffers of a rollout worker, measured on a CPU in the quick start; and the
# usual size of two CUDA contexts.
_ROLLOUT_BYTES = {"torch": GIB // 3, "vllm": GIB * 5 // 8}
_CONTEXTS_BYTES = GIB
CONTROLLER_BYTES = GIB  # of a CPU's memory: the controller, Ray, and what workers are forked from
_VLLM_BLOCK_TOKENS = 32
FROZEN_ROLES = ("reference", "reward")
_PARTS = ("weights", "gradients", "optimizer", "keys and values", "scoring", "training", "programs")


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of one device by part: `held` always, one of `turns` at a time where `sleeps`, else
    the keys and values with either of the others."""

    held: Mapping[str, int]
    turns: Mapping[str, int]
    sleeps: bool

    @property
    def total(self) -> int:
        """The most at one time."""
        return sum(self.held.values()) + self._shared(self.sleeps)

    @property
    def least(self) -> int:
        """`total`, were instances to sleep."""
        return sum(self.held.values()) + self._shared(True)

    def _shared(self, sleeps: bool) -> int:
        cache, scoring, training = (
            self.turns[name] for name in ("keys and values", "scoring", "training")
        )
        busiest = max(scoring, training)
        return max(cache, busiest) if sleeps else cache + busiest

    def text(self) -> str:
        """Every part in GiB, in one order."""
        parts = {**self.held, **self.turns}
        return ", ".join(f"{name} {parts[name] / GIB:.3g}" for name in _PARTS if parts.get(name))


def memory_plan(
    config: Config,
    workload: Workload,
    pipelines: Mapping[str, StagePlacement],
    *,
    cuda: bool,
    reference: Mapping[str, StagePlacement] | None = None,
) -> tuple[DeviceMemory, ...]:
    """One for each device. `cuda`: whether they are GPUs. `reference`: its forward-only pipelines
    beside the actor's, if any: those stages are held in addition to the scorers' whole models."""
    narrow = config.placement.dtype == "bfloat16" or (cuda and config.placement.dtype == "auto")
    size = 2 if narrow else 4
    return tuple(
        _device(config, workload, pipelines, reference or {}, device, size, cuda=cuda)
        for device in range(config.placement.num_devices)
    )


def sleeps(config: Config, *, cuda: bool) -> bool:
    """Whether instances give back their keys and values when others need the memory."""
    return cuda if config.rollout.sleep == "auto" else config.rollout.sleep == "on"


def swaps_frozen(config: Config, *, cuda: bool) -> bool:
    """Whether frozen scorers (reference, reward model) stay in the host's memory and are on a
    device only while it scores. Where groups are trained one by one it scores and trains by
    turns, and keeps them."""
    return cuda and sleeps(config, cuda=cuda) and not trains_groups(config)


def _device(
    config: Config,
    workload: Workload,
    pipelines: Mapping[str, StagePlacement],
    reference: Mapping[str, StagePlacement],
    device: int,
    size: int,
    *,
    cuda: bool,
) -> DeviceMemory:
    weights = gradients = optimizer = 0
    training = 0.0
    for name, placed in pipelines.items():
        if device not in placed.ranks:
            continue
        role, stage = role_of(name), placed.ranks.index(device)
        shape, model = workload.models[role], trained_model(config, role)
        own = stage_bytes(config, shape, pipelines, name, stage, size)
        weights += own.weights
        gradients += own.gradients
        optimizer += own.optimizer
        replica = len(replicas(pipelines, role))
        training += _activations(workload, model, shape, placed, stage, replica) * size
    for placed in reference.values():
        for stage in (s for s, home in enumerate(placed.ranks) if home == device):
            found, numbers = _forward_only(config, workload, placed, stage)
            weights, training = weights + found * size, training + numbers * size
    keys_and_values = workload.models["actor"].cache_values()
    resident, frozen = _resident(config, workload)
    if not swaps_frozen(config, cuda=cuda):
        resident, frozen = resident + frozen, 0
    return DeviceMemory(
        held={
            "weights": weights + size * resident,
            "gradients": gradients,
            "optimizer": optimizer,
            "programs": _programs(config, cuda),
        },
        turns={
            "keys and values": int(cache_tokens(config) * keys_and_values * size),
            "scoring": int((_scoring(config, workload) + frozen) * size),
            "training": int(training),
        },
        sleeps=sleeps(config, cuda=cuda),
    )


def cache_tokens(config: Config) -> int:
    """Tokens of keys and values that an instance has room for."""
    rollout = config.rollout
    longest = config.data.max_prompt_length + rollout.response_length
    tokens = rollout.cache_tokens or rollout.max_num_seqs * longest
    if rollout.engine == "vllm":  # as `engines.vllm_engine` asks for
        block = rollout.vllm.block_size or _VLLM_BLOCK_TOKENS
        tokens = (-(-tokens // block) + rollout.max_num_seqs + 1) * block
    return tokens


def _resident(config: Config, workload: Workload) -> tuple[int, int]:
    """Parameters of the whole models in a rollout worker (the scorers', and vLLM's own actor):
    those that are updated, and frozen ones."""
    updated = workload.models["actor"].num_parameters()
    updated *= 2 if config.rollout.engine == "vllm" else 1
    frozen = 0
    for role, shape in workload.models.items():
        count = shape.num_parameters(scalar_head=role in ("critic", "reward"))
        if role in FROZEN_ROLES:
            frozen += count
        elif role != "actor":
            updated += count
    return updated, frozen


def _programs(config: Config, cuda: bool) -> int:
    if cuda:
        return _CONTEXTS_BYTES
    return (
        _ROLLOUT_BYTES["vllm" if config.rollout.engine == "vllm" else "torch"]
        + TRAINING_PROGRAM_BYTES
    )


def _activations(
    workload: Workload,
    model: TrainedModelConfig,
    shape: ModelShape,
    placed: StagePlacement,
    stage: int,
    num_replicas: int,
) -> float:
    """Numbers kept for backward passes by the micro-batches that a stage has begun at one time (at
    most one for each stage from here on), and of the one at its end the logits or (from the forward
    pass on) the gradient of the head; and the messages that a stage is ready to receive."""
    share = workload.tokens_per_minibatch / num_replicas
    budget = model.ppo_max_token_len_per_gpu
    count = model.num_microbatches or max(1, -(-int(share) // budget))
    tokens = share / count
    first, end = placed.layers[stage]
    begun = min(count, len(placed.ranks) - stage)
    kept = tokens * begun * kept_values(model, end - first) * shape.hidden_size
    head = shape is workload.models["actor"]
    return kept + passing_values(model, shape, placed, stage, tokens, head=head)


def _forward_only(
    config: Config, workload: Workload, placed: StagePlacement, stage: int
) -> tuple[int, float]:
    """Parameters of a stage of the reference, and the numbers of its one micro-batch at a time:
    a layer's, and the logits at the end."""
    shape, model = workload.models["reference"], config.actor
    count = model.num_microbatches or max(
        1, -(-int(workload.tokens_per_minibatch) // model.ppo_max_token_len_per_gpu)
    )
    last = stage == len(placed.ranks) - 1
    numbers = KEPT_VALUES * shape.hidden_size + (shape.vocab_size if last else 0)
    found = stage_parameters(shape, placed, stage, scalar_head=False)
    return found, numbers * workload.tokens_per_minibatch / count


def _scoring(config: Config, workload: Workload) -> float:
    """Numbers of one scoring call: hidden states of a layer, and its logits."""
    tokens = config.rollout.score_token_budget
    widest = [
        4 * shape.hidden_size
        + 2 * shape.intermediate_size
        + (shape.vocab_size if role in ("actor", "reference") else 0)
        for role, shape in workload.models.items()
        if role in workload.scored
    ]
    return float(tokens * max(widest, default=0))


def check_room(
    plan: Sequence[DeviceMemory], homes: Sequence[Seat], *, cuda: bool
) -> tuple[str, ...]:
    """Warnings where memory that would do is in others' hands just now.

    Raises:
        ValueError: a device, or a machine whose processors are the devices, is too small; says
            what is needed, what is there, and what takes it.
    """
    if cuda:
        for device, (memory, seat) in enumerate(zip(plan, homes, strict=True)):
            room = int(seat.node.gpu_bytes * USABLE)
            if seat.node.gpu_bytes and memory.total > room:
                raise ValueError(_refusal(f"device {device}", [memory], memory.total, room))
        return ()
    told = []
    for node in {seat.node.node_id: seat.node for seat in homes}.values():
        here = [m for m, seat in zip(plan, homes, strict=True) if seat.node.node_id == node.node_id]
        needed = sum(memory.total for memory in here) + CONTROLLER_BYTES
        if node.memory_bytes and needed > node.memory_bytes:
            raise ValueError(_refusal(f"node {node.address}", here, needed, node.memory_bytes))
        if node.memory_bytes and needed > node.free_bytes:
            told.append(
                f"memory: {needed / GIB:.1f} GiB are planned on node {node.address}, where "
                f"{node.free_bytes / GIB:.1f} of {node.memory_bytes / GIB:.1f} GiB are free"
            )
    return tuple(told)


def _refusal(place: str, here: Sequence[DeviceMemory], needed: int, room: int) -> str:
    largest = max(here, key=lambda memory: memory.total)
    each = f" for {len(here)} devices" if len(here) > 1 else ""
    could = sum(memory.least for memory in here) + needed - sum(memory.total for memory in here)
    way_out = "rollout.sleep=on would make it fit" if could <= room else _way_out(largest)
    return (
        f"memory: {place} has {room / GIB:.1f} GiB to use, and the plan needs "
        f"{needed / GIB:.1f} GiB{each} (GiB per device: {largest.text()}); {way_out}"
    )


def _way_out(memory: DeviceMemory) -> str:
    parts = {**memory.held, **memory.turns}
    hints = {
        "keys and values": "lower rollout.max_num_seqs, or set a smaller rollout.cache_tokens",
        "scoring": "lower rollout.score_token_budget",
        "training": "raise num_microbatches, or set gradient_checkpointing",
    }
    most = max(parts, key=lambda name: parts[name])
    return hints.get(most, "use more devices (placement.num_devices), smaller models or lora_rank")
