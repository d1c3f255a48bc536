"""What a training worker holds in memory: of each stage always, and by the schedules that it runs.

Weights, gradients and optimizer states are counted; activations are those of the schedule's memory
model (every micro-batch from its forward pass to the end of its backward pass), at an estimate of
what a layer keeps.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from rlhfuse.config import Config, TrainedModelConfig
from rlhfuse.group_training import trains_groups
from rlhfuse.model_shape import ModelShape
from rlhfuse.placement import StagePlacement, replicas, role_of
from rlhfuse.planner.costs import GRADIENT_BYTES, KEPT_VALUES, MASTER_BYTES, MOMENT_BYTES
from rlhfuse.schedules.checks import peak_memory
from rlhfuse.schedules.ir import Pipeline, Schedule

GIB = 2**30
# Libraries, code and buffers of a worker on a CPU: measured in the quick start.
TRAINING_PROGRAM_BYTES = GIB * 3 // 8
POSTED = 2  # receives that are posted on a channel
_ANY_ORDER_BYTES = 8  # a gradient's sum over groups that are trained one by one, in any order


@dataclass(frozen=True, slots=True)
class StageBytes:
    """Of one trained stage, always there."""

    weights: int
    gradients: int
    optimizer: int


def stage_bytes(
    config: Config,
    shape: ModelShape,
    pipelines: Mapping[str, StagePlacement],
    name: str,
    stage: int,
    value_bytes: int,
) -> StageBytes:
    """Of stage `stage` of the pipeline `name`, whose weights take `value_bytes` each."""
    placed, role = pipelines[name], role_of(name)
    model = trained_model(config, role)
    count = stage_parameters(shape, placed, stage, scalar_head=role == "critic")
    adapters = _adapter_parameters(shape, model, placed, stage) if model.lora_rank else 0
    trained = adapters or count
    shards = len(replicas(pipelines, role)) if config.placement.shard_optimizer else 1
    state = MOMENT_BYTES + (MASTER_BYTES if value_bytes < 4 else 0)
    return StageBytes(
        weights=(count + adapters) * value_bytes,
        gradients=trained * (_ANY_ORDER_BYTES if trains_groups(config) else GRADIENT_BYTES),
        optimizer=trained * state // shards,
    )


def planned_peak(
    config: Config,
    shapes: Mapping[str, ModelShape],
    pipelines: Mapping[str, StagePlacement],
    rounds: Iterable[Schedule],
    rank: int,
    *,
    value_bytes: int,
    cuda: bool,
    reference: Mapping[str, StagePlacement] | None = None,
) -> int:
    """The most bytes that the training worker `rank` should hold while it runs `rounds`, of whose
    pipelines an activation is a number of tokens. `shapes`: by role. On a CPU with its programs, as
    a process is measured there."""
    row, tp = rank // config.placement.tp, config.placement.tp
    held = 0
    for name, placed in pipelines.items():
        for stage in (s for s, home in enumerate(placed.ranks) if home == row):
            own = stage_bytes(config, shapes[role_of(name)], pipelines, name, stage, value_bytes)
            held += own.weights + own.gradients + own.optimizer
    for placed in (reference or {}).values():
        for stage in (s for s, home in enumerate(placed.ranks) if home == row):
            shape = shapes["reference"]
            held += value_bytes * stage_parameters(shape, placed, stage, scalar_head=False)
    placements = {**pipelines, **(reference or {})}
    numbers = 0.0
    for schedule in rounds:
        pipes = schedule.problem.pipelines
        inside = [_in_numbers(config, shapes, placements, pipe) for pipe in pipes]
        whole = Schedule(replace(schedule.problem, pipelines=tuple(inside)), schedule.rows)
        passing = sum(_passing(config, shapes, placements, pipe, row) for pipe in pipes)
        numbers = max(numbers, peak_memory(whole)[row] + passing)
    programs = 0 if cuda else TRAINING_PROGRAM_BYTES
    return int((held + numbers * value_bytes) / tp) + programs


def kept_values(model: TrainedModelConfig, num_layers: int) -> float:
    """Numbers that a stage keeps for a micro-batch's backward pass, in units of the hidden size and
    per token."""
    return num_layers * (1 if model.gradient_checkpointing else KEPT_VALUES)


def passing_values(
    model: TrainedModelConfig,
    shape: ModelShape,
    placed: StagePlacement,
    stage: int,
    tokens: float,
    *,
    head: bool,
) -> float:
    """Numbers that come and go beside those: a layer that is computed again, messages that are
    awaited, and at the end of a language model (`head`) the logits or the gradient of the head."""
    again = KEPT_VALUES if model.gradient_checkpointing else 0
    last = stage == len(placed.ranks) - 1
    awaited = POSTED * ((stage > 0) + (not last))
    numbers = (again + awaited) * tokens * shape.hidden_size
    if last and head:
        numbers += max(tokens, shape.hidden_size) * shape.vocab_size
    return numbers


def stage_parameters(
    shape: ModelShape, placed: StagePlacement, stage: int, *, scalar_head: bool
) -> int:
    """Parameters of one pipeline stage; the first holds the embedding, the last norm and head."""
    first, end = placed.layers[stage]
    count = (end - first) * shape.layer_parameters
    is_first, is_last = stage == 0, stage == len(placed.ranks) - 1
    if is_first:
        count += shape.embedding_parameters
    if is_last:
        count += shape.hidden_size + (shape.hidden_size if scalar_head else 0)
        if not scalar_head and not (shape.tied and is_first):
            count += shape.embedding_parameters
    return count


def trained_model(config: Config, role: str) -> TrainedModelConfig:
    """Of a role that is trained; a reference's micro-batches are the actor's."""
    return config.critic if role == "critic" else config.actor


def _in_numbers(
    config: Config,
    shapes: Mapping[str, ModelShape],
    placements: Mapping[str, StagePlacement],
    pipe: Pipeline,
) -> Pipeline:
    """The pipeline with activations in numbers, where it has tokens."""
    role, placed = role_of(pipe.name), placements[pipe.name]
    width = shapes[role].hidden_size
    per_token = [
        width
        * (KEPT_VALUES if pipe.forward_only else kept_values(trained_model(config, role), end - at))
        for at, end in placed.layers
    ]
    return replace(
        pipe,
        activation=tuple(t * n for t, n in zip(pipe.activation, per_token, strict=True)),
        activation_after_input=tuple(
            t * n for t, n in zip(pipe.activation_after_input, per_token, strict=True)
        ),
    )


def _passing(
    config: Config,
    shapes: Mapping[str, ModelShape],
    placements: Mapping[str, StagePlacement],
    pipe: Pipeline,
    row: int,
) -> float:
    role, placed = role_of(pipe.name), placements[pipe.name]
    largest = max(pipe.microbatch_weights, default=0.0)
    return sum(
        passing_values(
            trained_model(config, role),
            shapes[role],
            placed,
            stage,
            pipe.activation[stage] * largest,
            head=role != "critic",
        )
        for stage, home in enumerate(placed.ranks)
        if home == row
    )


def _adapter_parameters(
    shape: ModelShape, model: TrainedModelConfig, placed: StagePlacement, stage: int
) -> int:
    """Of a stage, if all linear layers have one."""
    hidden, inner, query = shape.hidden_size, shape.intermediate_size, shape.query_size
    kv_size = shape.num_kv_heads * shape.head_dim
    ends = 2 * (hidden + query) + 2 * (hidden + kv_size)
    ends += (3 if shape.gated else 2) * (hidden + inner)
    first, end = placed.layers[stage]
    return model.lora_rank * ends * (end - first)
