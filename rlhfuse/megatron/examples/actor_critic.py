"""An actor and a reversed critic, trained together: what a Megatron script changes.

    torchrun --nproc-per-node 2 rlhfuse/megatron/examples/actor_critic.py

Runs on GPUs with NCCL. The tests run the same calls on a CPU, where Megatron needs the stand-ins of
``tests/megatron/tiny.py`` for what it hard-codes for CUDA.
"""

import logging
import os
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from rlhfuse.megatron import ModelContext, fused_forward_backward
from rlhfuse.megatron.values import make_value_model

VOCAB, LENGTH, MICROBATCH, NUM_MICROBATCHES = 512, 64, 2, 4


def build(stages: int, *, value_model: bool) -> tuple[Any, Any]:
    """A small GPT under Megatron's DDP, with its optimizer, in the parallel state of the moment."""
    config = TransformerConfig(
        num_layers=2 * stages,
        hidden_size=128,
        num_attention_heads=4,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    model: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    if value_model:
        make_value_model(model)
    model = DistributedDataParallel(
        config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model.cuda()
    )
    config.no_sync_func = model.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return model, get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4), [model])


def forward_step(value_model: bool, data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """As in any Megatron script: the output, and the loss function for the last stage."""
    tokens = next(data)
    positions = torch.arange(LENGTH, device=tokens.device).expand(MICROBATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, device=tokens.device).tril().logical_not()[None, None]
    output = model(tokens[:, :-1], positions, mask, labels=None if value_model else tokens[:, 1:])
    return output, partial(loss, value_model)


def loss(value_model: bool, output: torch.Tensor) -> tuple[torch.Tensor, dict[str, float]]:
    """Stands for PPO's losses (``rlhfuse.megatron.losses``)."""
    value = (output - 1.0).square().mean() if value_model else output.mean()
    return value, {"loss": float(value.detach())}


def arguments(model: Any, step: int, *, value_model: bool) -> dict[str, Any]:
    """Megatron's usual keyword arguments."""
    generator = torch.Generator().manual_seed(step)
    size = (NUM_MICROBATCHES, MICROBATCH, LENGTH + 1)
    tokens = torch.randint(0, VOCAB, size, generator=generator).cuda()
    return {
        "forward_step_func": partial(forward_step, value_model),
        "data_iterator": iter(tokens),
        "model": model,
        "num_microbatches": NUM_MICROBATCHES,
        "seq_length": LENGTH,
        "micro_batch_size": MICROBATCH,
    }


def train(stages: int, steps: int) -> list[dict[str, list[Any]]]:
    """Both models' updates; what their loss functions reported, on the ranks where they ran."""
    parallel_state.initialize_model_parallel(1, stages)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(1)  # Megatron initializes weights from its own stream
    actor, actor_optimizer = build(stages, value_model=False)
    critic_state = ModelContext.create(
        lambda: parallel_state.initialize_model_parallel(1, stages), reverse=True
    )
    with critic_state.active():
        critic, critic_optimizer = build(stages, value_model=True)

    reported = []
    for step in range(steps):
        for model in (actor, critic):
            model.zero_grad_buffer()
        stores = fused_forward_backward(
            {
                "actor": arguments(actor, step, value_model=False),
                "critic": arguments(critic, step, value_model=True),
            },
            schedule="fuse-split",
            contexts={"critic": critic_state},
        )
        actor_optimizer.step()
        with critic_state.active():
            critic_optimizer.step()
        logging.info("step %d: %s", step, {name: store for name, store in stores.items() if store})
        reported.append(stores)
    return reported


def main() -> None:
    """Three updates, a process per GPU."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    train(torch.distributed.get_world_size(), steps=3)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
