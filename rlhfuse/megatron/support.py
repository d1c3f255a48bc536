"""What runs on our schedules, what is left to Megatron's, and what is refused; and why."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from rlhfuse.megatron.call import Call


class Verdict(StrEnum):
    """How a setting is met."""

    SUPPORTED = "supported"
    FALLS_BACK = "falls back"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Support:
    """One setting of a configuration, with what happens to it."""

    setting: str
    value: str
    verdict: Verdict
    reason: str

    def __str__(self) -> str:
        return f"{self.setting:<48} {self.value:<12} {self.verdict.value:<10}  {self.reason}"


_FALLS_BACK = (
    (
        "overlap_moe_expert_parallel_comm",
        "Megatron combines forward and backward of two micro-batches in one task",
    ),
    ("hybrid_context_parallel", "micro-batches are cut inside Megatron's schedule"),
    ("fine_grained_activation_offloading", "offloading counts on the order of Megatron's schedule"),
    ("use_ring_exchange_p2p", "needs a torch built with ring exchange"),
)
_SUPPORTED = (
    (
        "virtual_pipeline_model_parallel_size",
        "each chunk is a stage; the default order is Megatron's interleaved one",
    ),
    ("variable_seq_lengths", "a header with the shape travels before each message"),
    ("deallocate_pipeline_outputs", "as soon as the output is on its way"),
    (
        "num_microbatches_with_partial_activation_checkpoints",
        "counted against what the schedule holds",
    ),
    ("recompute_granularity", "inside the model"),
    ("sequence_parallel", "message shapes and split layers know it"),
    ("tensor_model_parallel_size", "each tensor-parallel rank runs the same row"),
    ("context_parallel_size", "message shapes and loss scaling know it"),
    ("expert_model_parallel_size", "auxiliary losses are scaled per model"),
    ("calculate_per_token_loss", "tokens are counted as Megatron does"),
    (
        "delay_wgrad_compute",
        "the layers' backward_dw() is the W task; where a backward is not split, it follows",
    ),
    (
        "overlap_p2p_comm",
        "our sends never block and receives are posted ahead: the setting has no effect",
    ),
    ("batch_p2p_comm", "messages travel one by one, in a group per direction: no effect"),
    (
        "mtp_num_layers",
        "loss scale per model; a split backward sums the shared output layer's "
        "gradients in another order (equal to rounding)",
    ),
)
_NOT_WITH_SPLIT = (
    ("defer_embedding_wgrad_compute", "it defers weight gradients itself"),
    ("enable_autocast", "split layers compute in the weights' type"),
    ("cpu_offloading", "split layers keep their inputs themselves"),
)


def explain(
    config: Any, *, split_weight: bool = False, fused_with: Any = None
) -> tuple[Support, ...]:
    """What becomes of every setting of `config` that concerns schedules. Print its lines.

    `split_weight`: for schedules with I and W, such as zero-bubble. `fused_with`: the other model's
    config, for `fused_forward_backward`.
    """
    together = () if fused_with is None else tuple(_together(config, fused_with))
    return (*_rows(config, split_weight), *together)


def refusals(configs: Mapping[str, Any]) -> list[str]:
    """Why these models cannot run in one call, on any schedule; empty if they can."""
    (first, config), *others = configs.items()
    return [
        f"{first} and {name}: {row.setting}={row.value}: {row.reason}"
        for name, other in others
        for row in _together(config, other)
        if row.verdict is Verdict.REFUSED
    ]


def _delayed_scaling(config: Any) -> bool:
    return bool(getattr(config, "fp8", None)) and getattr(config, "fp8_recipe", "") == "delayed"


def serial_reasons(configs: Mapping[str, Any]) -> list[str]:
    """Why these models run one after the other, though each fits a schedule of its own."""
    (_, config), *others = configs.items()
    return [
        f"{row.setting}={row.value}: {row.reason}"
        for _, other in others
        for row in _together(config, other)
        if row.verdict is Verdict.FALLS_BACK
    ]


def _together(one: Any, other: Any) -> Iterator[Support]:
    """What two models in one call must not share, and what they must."""
    if one is other:
        yield Support(
            "config",
            "shared",
            Verdict.REFUSED,
            "no_sync_func and the other hooks in it belong to one model: the other's gradients "
            "would not be reduced; give each model a config of its own (copy.copy before its DDP)",
        )
    if any(_delayed_scaling(config) for config in (one, other)):
        yield Support(
            "fp8_recipe",
            "delayed",
            Verdict.FALLS_BACK,
            "Transformer Engine keeps its history of scales per process, not per model: not tried "
            "fused, models run one after the other; other recipes have no history",
        )
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        sizes = getattr(one, name, 1), getattr(other, name, 1)
        if sizes[0] != sizes[1]:
            yield Support(
                name,
                f"{sizes[0]}, {sizes[1]}",
                Verdict.REFUSED,
                "ranks that compute a layer of one model together would run different rows of the "
                "schedule, and could wait for each other for ever; use one size for both",
            )


def fall_back_reasons(call: Call, *, split_weight: bool) -> list[str]:
    """Why this call is left to Megatron's schedule; empty if it runs on ours."""
    reasons = fall_back_reasons_of(call.config, split_weight=split_weight)
    if call.unknown and any(value is not None for value in call.unknown.values()):
        reasons.append(f"unknown argument {', '.join(sorted(call.unknown))}")
    if call.adjust_tensor_shapes_fn is not None:
        reasons.append("adjust_tensor_shapes_fn: several tensors in one message")
    if isinstance(getattr(call.p2p_communicator, "pp_group", None), list):
        reasons.append("p2p_communicator: several modules in one pipeline")
    return reasons


def fall_back_reasons_of(config: Any, *, split_weight: bool) -> list[str]:
    """As `fall_back_reasons`, from the configuration alone."""
    rows = _rows(config, split_weight)
    return [f"{r.setting}={r.value}: {r.reason}" for r in rows if r.verdict in _NOT_OURS]


_NOT_OURS = (Verdict.FALLS_BACK, Verdict.REFUSED)


def _rows(config: Any, split: bool) -> Iterator[Support]:
    if getattr(config, "pipeline_model_parallel_size", 1) > 1 and config.pipeline_dtype is None:
        reason = "the type of messages is not known; set it, Megatron's own schedule needs it too"
        yield _row(config, "pipeline_dtype", Verdict.REFUSED, reason)
    for name, reason in _FALLS_BACK:
        if getattr(config, name, False):
            yield _row(config, name, Verdict.FALLS_BACK, reason)
    if getattr(config, "cuda_graph_impl", None) in _GRAPHS:
        reason = _GRAPHS[config.cuda_graph_impl]
        yield _row(config, "cuda_graph_impl", Verdict.FALLS_BACK, reason)
    yield from _engine_rows(config, split and not getattr(config, "delay_wgrad_compute", False))
    for name, reason in _NOT_WITH_SPLIT if split else ():
        if getattr(config, name, False):
            yield _row(config, name, Verdict.FALLS_BACK, f"with split weights: {reason}")
    for name, reason in _SUPPORTED:
        value = getattr(config, name, None)
        uncut = name.endswith("_size") and value == 1
        if value is not None and value is not False and not uncut:
            yield _row(config, name, Verdict.SUPPORTED, reason)


def _engine_rows(config: Any, unsplit: bool) -> Iterator[Support]:
    """Transformer Engine. `unsplit`: the schedule has W, and its layers do not."""
    for name in ("fp8", "fp4"):
        if getattr(config, name, None):
            yield _row(config, name, *_LOW_PRECISION[unsplit])
    if getattr(config, "transformer_impl", None) == "transformer_engine":
        yield _row(config, "transformer_impl", Verdict.SUPPORTED, _ENGINE[unsplit])


_GRAPHS = {
    "local": "graphs are captured in the order of Megatron's schedule",
    "transformer_engine": "graphs are captured for the order of Megatron's schedule, and share "
    "their buffers between micro-batches",
}
_LOW_PRECISION = {
    False: (
        Verdict.SUPPORTED,
        "first_val_step and first micro-batches are passed on; not tried "
        "here: it needs Transformer Engine and a GPU",
    ),
    True: (
        Verdict.FALLS_BACK,
        "with split weights: only delay_wgrad_compute splits layers of low precision",
    ),
}
_ENGINE = {
    False: "inside the model",
    True: "inside the model; with split weights its layers' weight gradients stay in the input "
    "gradients' tasks, unless delay_wgrad_compute is set (see rlhfuse.megatron.delayed)",
}


def _row(config: Any, name: str, verdict: Verdict, reason: str) -> Support:
    return Support(name, str(getattr(config, name)), verdict, reason)
