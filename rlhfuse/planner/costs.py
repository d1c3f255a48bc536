"""Seconds and bytes from a hardware and model description: a roofline with stated efficiencies.

Decoding reads all weights and the cache at every step, or is bound by products at large batches;
prefill, scoring and training are bound by products; tensor parallelism adds two all-reduces a layer
and pass. Nothing here was measured: `CostModel.basis` says so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import msgspec

from rlhfuse.cost import CostModel
from rlhfuse.hardware import Cluster
from rlhfuse.model_shape import ModelShape

# Bytes per parameter beside the weights themselves: gradient sums in float32; Adam's moments, and
# float32 masters where weights are narrower (as `rlhfuse.training.optimizer` keeps them).
GRADIENT_BYTES = 4
MOMENT_BYTES = 8
MASTER_BYTES = 4
# Activation values that a layer keeps per token for its backward pass, in units of the hidden
# size, with fused attention (Korthikanti et al., arXiv 2205.05198, eq. 2: 34 bytes at 2 a value).
KEPT_VALUES = 17
USABLE = 0.92  # of a device's memory: the rest is the allocator's, the libraries' and buffers'


class Parallel(msgspec.Struct, frozen=True):
    """Devices of one trained model: `tp` * `pp` * `dp`."""

    tp: int
    pp: int
    dp: int

    def text(self) -> str:
        return f"tp {self.tp} x pp {self.pp} x dp {self.dp}"


@dataclass(frozen=True, slots=True)
class StageTimes:
    """One micro-batch of `tokens` on each pp_stage: seconds, and bytes that one device keeps."""

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    weight: tuple[float, ...]  # the part of backward that may be split off
    activation: tuple[float, ...]
    hop_s: float  # one message between neighbouring stages


def rollout_costs(
    models: Mapping[str, ModelShape],
    scored: Sequence[str],
    cluster: Cluster,
    tp: int,
    block: int,
    mean_context: float,
) -> CostModel:
    """What generation and inference cost on instances of `tp` devices; scorers span `block` of
    them. `mean_context`: tokens that a scored token attends to."""
    device, efficiency = cluster.device, cluster.device.efficiency
    actor = models["actor"]
    knots = tuple(float(2**i) for i in range(13))
    score = {role: _score_token_s(models[role], role, cluster, tp * block, mean_context)
             for role in scored}  # fmt: skip
    cache = actor.cache_values(tp) * device.value_bytes
    synced = max(
        [_weight_bytes(actor, "actor", cluster) / tp]
        + [_weight_bytes(models[r], r, cluster) / (tp * block) for r in scored if r == "critic"]
    )
    swapped = max((_weight_bytes(models[r], r, cluster) for r in scored), default=0.0)
    deepest = max((models[r].num_layers for r in scored), default=1)
    infer_s = actor.forward_flops(mean_context) / (device.flops * efficiency.infer * tp)
    return CostModel(
        decode_batch=knots,
        decode_step_s=tuple(_decode_s(actor, cluster, tp, batch) for batch in knots),
        decode_context_s=cache / (device.memory_bandwidth * efficiency.memory),
        prefill_token_s=infer_s + _tensor_s(actor, cluster, tp, 1.0, 1.0),
        prefill_call_s=actor.num_layers * efficiency.launch_s + efficiency.task_s,
        score_token_s=score,
        score_call_s=deepest * efficiency.launch_s + efficiency.task_s,
        migrate_token_s=cluster.between_s(
            actor.cache_values(tp) * device.value_bytes, cluster.node_size
        ),
        migrate_call_s=efficiency.task_s,
        weight_sync_s=cluster.between_s(synced, cluster.node_size) + efficiency.task_s,
        swap_s=swapped / (tp * block) / device.host_bandwidth,
        basis={"all": f"predicted for {device.name}, {tp} devices an instance"},
    )


def _weight_bytes(model: ModelShape, role: str, cluster: Cluster) -> float:
    scalar = role in ("critic", "reward")
    return model.num_parameters(scalar_head=scalar) * float(cluster.device.value_bytes)


def _decode_s(model: ModelShape, cluster: Cluster, tp: int, batch: float) -> float:
    """One engine step without the reading of the cache."""
    device, efficiency = cluster.device, cluster.device.efficiency
    read = _weight_bytes(model, "actor", cluster) / (device.memory_bandwidth * efficiency.memory)
    products = batch * model.forward_flops(0.0) / (device.flops * efficiency.infer)
    fixed = efficiency.step_s + model.num_layers * efficiency.graph_s
    return max(read, products) / tp + _tensor_s(model, cluster, tp, batch, 0.0) + fixed


def _tensor_s(
    model: ModelShape, cluster: Cluster, tp: int, tokens: float, bandwidth_only: float
) -> float:
    """The all-reduces of one forward pass; `bandwidth_only` 1 leaves their latency out."""
    if tp == 1:
        return 0.0
    group = min(tp, cluster.node_size)
    size = tokens * model.hidden_size * cluster.device.value_bytes
    one = cluster.all_reduce_s(size, group)
    return 2 * model.num_layers * (one - bandwidth_only * cluster.device.efficiency.collective_s)


def _score_token_s(
    model: ModelShape, role: str, cluster: Cluster, tp: int, mean_context: float
) -> float:
    device, efficiency = cluster.device, cluster.device.efficiency
    flops = model.forward_flops(mean_context, scalar_head=role in ("critic", "reward"))
    products = flops / (device.flops * efficiency.infer * tp)
    return products + _tensor_s(model, cluster, tp, 1.0, 1.0)


# --- training --------------------------------------------------------------------------------


def split_layers(model: ModelShape, pp: int, *, scalar_head: bool) -> tuple[int, ...]:
    """Layers per stage, such that the dearest stage is as cheap as it can be: even, with fewer
    on the last stage where its head weighs as much as a layer or more."""
    if pp == 1:
        return (model.num_layers,)
    head = model.head_flops(scalar_head=scalar_head) / model.layer_flops(0.0)
    others = pp - 1

    def dearest(last: int) -> float:
        return max(-(-(model.num_layers - last) // others), last + head)

    last = min(range(1, model.num_layers - others + 1), key=lambda n: (dearest(n), -n))
    each, more = divmod(model.num_layers - last, others)
    return (*(each + (stage < more) for stage in range(others)), last)


def stage_times(
    model: ModelShape,
    role: str,
    cluster: Cluster,
    parallel: Parallel,
    tokens: float,
    mean_total: float,
    *,
    recompute: bool,
    layers: Sequence[int] = (),
) -> StageTimes:
    """One micro-batch of `tokens` tokens in samples of `mean_total` tokens. `layers` per stage;
    by default `split_layers`."""
    device, efficiency = cluster.device, cluster.device.efficiency
    scalar = role == "critic"
    rate = device.flops * efficiency.train * parallel.tp
    reduced = _tensor_s(model, cluster, parallel.tp, tokens, 0.0) / model.num_layers
    launch = efficiency.launch_s
    layers = layers or split_layers(model, parallel.pp, scalar_head=scalar)
    forward, backward, weight, activation = [], [], [], []
    for stage, count in enumerate(layers):
        flops = count * model.layer_flops(mean_total / 2)
        head = model.head_flops(scalar_head=scalar) if stage == parallel.pp - 1 else 0.0
        products = tokens * (flops + head) / rate
        once = products + count * (reduced + launch)
        forward.append(once)
        again = once if recompute else 0.0
        backward.append(2 * products + count * (reduced + 2 * launch) + again)
        weight.append(products)
        kept = 1 if recompute else KEPT_VALUES
        values: float = (count * kept + (KEPT_VALUES if recompute else 0)) * model.hidden_size
        values += head / (2.0 * model.hidden_size)  # logits
        activation.append(tokens * values * device.value_bytes / parallel.tp)
    message = tokens * model.hidden_size * device.value_bytes / parallel.tp
    hop = cluster.between_s(message, parallel.tp) + efficiency.collective_s
    return StageTimes(
        tuple(forward), tuple(backward), tuple(weight), tuple(activation),
        hop if parallel.pp > 1 else 0.0,
    )  # fmt: skip


def exchange_s(model: ModelShape, role: str, cluster: Cluster, parallel: Parallel) -> float:
    """Per mini-batch: gradients summed over replicas and new weights spread, as far as backward
    does not hide it, and the optimizer's own pass over its memory."""
    device, efficiency = cluster.device, cluster.device.efficiency
    mine = model.num_parameters(scalar_head=role == "critic") / (parallel.tp * parallel.pp)
    moved = 2 * (parallel.dp - 1) / parallel.dp * mine * device.value_bytes
    span = cluster.node_size if parallel.tp * parallel.dp > cluster.node_size else 1
    exposed = (1 - efficiency.sync_overlap) * cluster.between_s(moved, span)
    state = mine / parallel.dp * 2 * (GRADIENT_BYTES + MOMENT_BYTES + MASTER_BYTES)
    return exposed + state / (device.memory_bandwidth * efficiency.memory) + efficiency.task_s


def held_bytes(
    model: ModelShape, role: str, cluster: Cluster, parallel: Parallel
) -> tuple[float, float]:
    """(weights and gradient sums, optimizer state) of one device between steps."""
    size = cluster.device.value_bytes
    mine = model.num_parameters(scalar_head=role == "critic") / (parallel.tp * parallel.pp)
    master = MASTER_BYTES if size < 4 else 0
    return mine * (size + GRADIENT_BYTES), mine * (MOMENT_BYTES + master) / parallel.dp


def engine_bytes(models: Mapping[str, ModelShape], cluster: Cluster, tp: int) -> float:
    """The actor's weights in a generation engine, per device."""
    return _weight_bytes(models["actor"], "actor", cluster) / tp


def scorer_bytes(
    models: Mapping[str, ModelShape], scored: Sequence[str], cluster: Cluster, devices: int
) -> float:
    """The largest scorer's weights per device, over `devices` devices."""
    sizes = [_weight_bytes(models[role], role, cluster) for role in scored if role != "actor"]
    return max(sizes, default=0.0) / devices


def cache_bytes(models: Mapping[str, ModelShape], cluster: Cluster, tp: int) -> float:
    """Keys and values of one token, per device."""
    return models["actor"].cache_values(tp) * cluster.device.value_bytes
