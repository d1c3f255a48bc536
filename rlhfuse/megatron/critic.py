"""A critic for `fused_forward_backward`, from a Megatron configuration and checkpoint."""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_attr_wrapped_model

from rlhfuse.megatron.context import ModelContext
from rlhfuse.megatron.values import make_value_model

logger = logging.getLogger(__name__)

Provider = Callable[[Any, bool, bool], torch.nn.Module]
"""(config, pre_process, post_process) -> a GPT model of this rank's stage, as in Megatron's
training scripts."""


@dataclass(frozen=True, slots=True)
class Critic:
    """A value model under DDP, with all that it needs for a fused call. Step the optimizer inside
    ``with context.active()``."""

    context: ModelContext
    model: Any
    optimizer: MegatronOptimizer


def build_reversed_critic(
    config: Any,
    provider: Provider,
    initialize: Callable[[], None],
    *,
    ddp: DistributedDataParallelConfig,
    optimizer: OptimizerConfig,
    checkpoint: Path | None = None,
    device: torch.device | None = None,
) -> Critic:
    """A value model whose pipeline runs from the last rank to the first. Collective.

    Args:
        config: a TransformerConfig, such as the actor's: it is copied, since hooks go into it.
        provider: builds the language model; its output layer gives way to a value head.
        initialize: calls ``initialize_model_parallel`` with the critic's sizes.
        checkpoint: a folder of Megatron's distributed checkpoint. Weights come from there; where
            it holds a language model, the value head stays new.
        device: where the model goes; by default the current CUDA device.

    Raises:
        ValueError: embeddings are tied, or there is no such checkpoint.
    """
    config = copy.copy(config)
    context = ModelContext.create(initialize, reverse=True)
    with context.active():
        gpt = make_value_model(
            provider(
                config,
                parallel_state.is_pipeline_first_stage(),
                parallel_state.is_pipeline_last_stage(),
            )
        )
        if checkpoint is not None:
            load_weights(gpt, checkpoint)
        gpt = gpt.to(torch.cuda.current_device() if device is None else device)
        wrapped = Float16Module(config, gpt) if config.bf16 or config.fp16 else gpt
        model = DistributedDataParallel(config, ddp, wrapped)
        config.no_sync_func = model.no_sync
        config.finalize_model_grads_func = finalize_model_grads
        return Critic(context, model, get_megatron_optimizer(optimizer, [model]))


def load_weights(model: torch.nn.Module, checkpoint: Path) -> None:
    """Weights from a distributed checkpoint, also one of other parallel sizes, into a model that
    is not wrapped yet. Collective. An output layer of another shape is left as it is.

    Raises:
        ValueError: there is no such checkpoint.
    """
    if not (checkpoint / "metadata.json").is_file():
        raise ValueError(f"checkpoint {checkpoint}: no distributed checkpoint is there")
    gpt: Any = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
    wanted = gpt.sharded_state_dict()
    saved = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    for name, tensor in list(wanted.items()):
        head = name.startswith("output_layer.") and isinstance(tensor, ShardedTensor)
        if head and (
            tensor.key not in saved or saved[tensor.key].global_shape != tensor.global_shape
        ):
            logger.warning("%s: has no value head, a new one is used", checkpoint)
            del wanted[name]
    state: Any = dist_checkpointing.load({"model": wanted}, str(checkpoint))
    gpt.load_state_dict(state["model"], strict=False)
