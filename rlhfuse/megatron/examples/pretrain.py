"""A plain Megatron-core training script, with one line changed.

    torchrun --nproc-per-node 2 rlhfuse/megatron/examples/pretrain.py

Runs on GPUs with NCCL, a pipeline stage each. The tests run the same loop on a CPU, where Megatron
needs the stand-ins of ``rlhfuse.megatron.cpu``.
"""

import logging
import os
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

# The changed line. It was: from megatron.core.pipeline_parallel import get_forward_backward_func
from rlhfuse.megatron import get_forward_backward_func

VOCAB, LENGTH, MICROBATCH, NUM_MICROBATCHES = 512, 64, 2, 4


def build(stages: int) -> tuple[Any, Any]:
    """A small GPT under Megatron's DDP, and its optimizer."""
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
    gpt: Any = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        position_embedding_type="rope",
    )
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    model = DistributedDataParallel(config, ddp, gpt.cuda())
    config.no_sync_func = model.no_sync
    config.finalize_model_grads_func = finalize_model_grads
    return model, get_megatron_optimizer(OptimizerConfig(optimizer="adam", lr=1e-4), [model])


def forward_step(data: Any, model: Any) -> tuple[torch.Tensor, Any]:
    """Megatron's ``forward_step_func``: the output, and the loss function for the last stage."""
    tokens = next(data)
    positions = torch.arange(LENGTH, device=tokens.device).expand(MICROBATCH, LENGTH)
    mask = torch.ones(LENGTH, LENGTH, device=tokens.device).tril().logical_not()[None, None]
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]), mean


def mean(losses: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and what to report of it."""
    loss = losses.mean()
    return loss, {"loss": loss.detach().clone()}


def train(stages: int, steps: int) -> list[list[float]]:
    """Reported losses of each step's micro-batches, on the last stage; elsewhere none."""
    parallel_state.initialize_model_parallel(1, stages)
    if torch.cuda.is_available():
        model_parallel_cuda_manual_seed(1)  # Megatron initializes weights from its own stream
    model, optimizer = build(stages)
    generator = torch.Generator().manual_seed(0)
    size = (NUM_MICROBATCHES, MICROBATCH, LENGTH + 1)
    tokens = torch.randint(0, VOCAB, size, generator=generator).cuda()
    history = []
    for step in range(steps):
        model.zero_grad_buffer()
        reported = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(tokens),
            model=model,
            num_microbatches=NUM_MICROBATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICROBATCH,
            forward_only=False,
        )
        optimizer.step()
        history.append([float(one["loss"]) for one in reported])
        logging.info("step %d: %s", step, history[-1])
    return history


def main() -> None:
    """Three steps, a process per GPU."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    train(torch.distributed.get_world_size(), steps=3)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
