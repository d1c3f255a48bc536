"""Megatron on a CPU, and tiny GPT models on it: shared by the tests and the benchmark."""

import queue
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import layers
from megatron.core.timers import Timers
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model

VOCAB = 64


@dataclass(frozen=True)
class Setting:
    """One way to train a tiny model."""

    pp: int = 2
    tp: int = 1
    cp: int = 1
    ep: int = 1
    chunks: int = 1
    num_layers: int = 4
    hidden: int = 32
    num_microbatches: int = 4
    lengths: tuple[int, ...] = (16,)
    ddp: bool = True
    overlap: bool = False
    distributed_optimizer: bool = False
    gather: bool = False
    """Weights are gathered over replicas while it computes (all of the distributed optimizer)."""
    tied: bool = False
    per_token: bool = False
    three: bool = False
    deallocate: bool = False
    sequence_parallel: bool = False
    experts: int | None = None
    value_head: bool = False
    timers: bool = False
    loss_scale: float | None = None
    partial_checkpoints: int | None = None
    recompute: bool = False
    mtp: int | None = None
    """Further tokens that the last stage predicts."""
    accumulation_fusion: bool = False
    own_linears: bool = False
    """`DelayingLinear` in place of Megatron's local layers."""
    delayed: bool = False
    """They keep their weight gradients back."""
    seed: int = 0
    steps: int = 1
    """Updates that are compared; the second sees what the first left behind."""

    @property
    def variable(self) -> bool:
        return len(self.lengths) > 1


def init_parallel(setting: Setting) -> None:
    """Megatron's process groups for `setting`."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=setting.tp,
        pipeline_model_parallel_size=setting.pp,
        virtual_pipeline_model_parallel_size=setting.chunks if setting.chunks > 1 else None,
        context_parallel_size=setting.cp,
        expert_model_parallel_size=setting.ep,
    )


def config_for(setting: Setting) -> TransformerConfig:
    layers.fused_weight_gradient_mlp_cuda = FusedKernels
    layers._grad_accum_fusion_available = True
    config = TransformerConfig(
        num_layers=setting.num_layers,
        hidden_size=setting.hidden,
        num_attention_heads=4,
        ffn_hidden_size=2 * setting.hidden,
        num_query_groups=2,
        use_cpu_initialization=True,
        pipeline_dtype=torch.float32,
        tensor_model_parallel_size=setting.tp,
        pipeline_model_parallel_size=setting.pp,
        virtual_pipeline_model_parallel_size=setting.chunks if setting.chunks > 1 else None,
        context_parallel_size=setting.cp,
        expert_model_parallel_size=setting.ep,
        sequence_parallel=setting.sequence_parallel,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=setting.accumulation_fusion,
        apply_rope_fusion=False,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        deallocate_pipeline_outputs=setting.deallocate,
        calculate_per_token_loss=setting.per_token,
        num_moe_experts=setting.experts,
        moe_router_load_balancing_type="aux_loss" if setting.experts else "none",
        moe_aux_loss_coeff=0.1 if setting.experts else 0.0,
        moe_token_dispatcher_type="allgather" if setting.experts else "alltoall",
        variable_seq_lengths=setting.variable,
        batch_p2p_comm=False,
        num_microbatches_with_partial_activation_checkpoints=setting.partial_checkpoints,
        recompute_granularity="full" if setting.recompute else None,
        recompute_method="uniform" if setting.recompute else None,
        recompute_num_layers=1 if setting.recompute else None,
        mtp_num_layers=setting.mtp,
        mtp_loss_scaling_factor=0.1,  # None before 0.16
    )
    config.delay_wgrad_compute = setting.delayed  # made with it, a config wants Megatron's schedule
    return config


class FusedKernels:
    """What Apex's extension computes on a GPU."""

    @staticmethod
    def wgrad_gemm_accum_fp32(
        rows: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor
    ) -> None:
        main_grad.add_(gradient.t().matmul(rows))


class DelayingLinear(torch.nn.Module):
    """A linear layer that keeps its weight gradients back as Transformer Engine's do: in a store,
    first in, first out, until `backward_dw`, which then calls the hooks of Megatron's DDP."""

    def __init__(
        self, input_size: int, output_size: int, *, config: Any, init_method: Any, **_: Any
    ) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size))
        init_method(self.weight)
        self.delays = bool(config.delay_wgrad_compute)
        if self.delays:
            vars(self.weight)["skip_backward_post_hook"] = True
        self.store: queue.Queue[tuple[torch.Tensor, torch.Tensor]] = queue.Queue()
        self.hooks: list[Callable[[], None]] = []

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, None]:
        out: torch.Tensor = _Delaying.apply(rows, self.weight, self)  # type: ignore[no-untyped-call]
        return out, None

    def register_wgrad_accumulation_and_reduce_hooks(self, hook: Callable[[], None]) -> None:
        self.hooks.append(hook)

    def backward_dw(self) -> None:
        if not self.delays:
            return
        rows, gradient = self.store.get_nowait()
        self.weight.grad = gradient.t().matmul(rows)
        for hook in self.hooks:
            hook()


class _Delaying(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, weight: torch.Tensor, linear: DelayingLinear
    ) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.linear = linear
        return rows.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        rows, weight = ctx.saved_tensors
        kept = rows.reshape(-1, rows.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        if ctx.linear.delays:
            ctx.linear.store.put(kept)
        by_weight = None if ctx.linear.delays else kept[1].t().matmul(kept[0])
        return gradient.matmul(weight), by_weight, None


class ValuesAsTheyAre(torch.nn.Module):
    """Attention that attends to the token itself: Megatron's own local one knows no cp."""

    def __init__(self, **_: Any) -> None:
        super().__init__()

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any
    ) -> torch.Tensor:
        groups = query.shape[2] // value.shape[2]
        mixed = value.repeat_interleave(groups, dim=2) + 0 * query
        return mixed.reshape(*query.shape[:2], -1)


def layer_spec(setting: Setting) -> Any:
    spec = get_gpt_layer_local_spec(num_experts=setting.experts, normalization="RMSNorm")
    attention = spec.submodules.self_attention.submodules
    if setting.cp > 1:
        attention.core_attention = ValuesAsTheyAre
    if setting.own_linears:
        mlp = spec.submodules.mlp.submodules
        attention.linear_qkv = attention.linear_proj = DelayingLinear
        mlp.linear_fc1 = mlp.linear_fc2 = DelayingLinear
    return spec


class Trained:
    """A model on this rank with its optimizer, in the parallel state of the moment."""

    def __init__(self, setting: Setting, head: Callable[[Any], object] | None = None) -> None:
        self.setting = setting
        self.config = config_for(setting)
        self.seen: list[tuple[object, ...]] = []
        """What Megatron's schedule told of each forward: chunk, micro-batch, first, flags."""
        self._first = False
        if setting.timers:
            self.config.timers = Timers(2, "minmax")
        if setting.loss_scale is not None:
            self.config.grad_scale_func = partial(torch.mul, torch.tensor(setting.loss_scale))
        self.chunks = [self._chunk(index, head) for index in range(setting.chunks)]
        self.optimizer = None
        for chunk in self.chunks:
            vars(chunk)["set_is_first_microbatch"] = self._is_first
        if setting.ddp:
            self._wrap()
            self.optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam",
                    lr=1e-2,
                    use_distributed_optimizer=setting.distributed_optimizer or setting.gather,
                    overlap_param_gather=setting.gather,
                    clip_grad=1.0,
                ),
                self.chunks,
            )

    def _chunk(self, index: int, head: Callable[[Any], object] | None) -> Any:
        setting = self.setting
        torch.manual_seed(setting.seed)
        stage = {"vp_stage": index} if setting.chunks > 1 else {}
        spec = layer_spec(setting)
        further = None
        if setting.mtp:
            further = get_gpt_mtp_block_spec(self.config, spec, use_transformer_engine=False)
        model = GPTModel(
            config=self.config,
            transformer_layer_spec=spec,
            mtp_block_spec=further,
            vocab_size=VOCAB,
            max_sequence_length=64,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
            share_embeddings_and_output_weights=setting.tied,
            position_embedding_type="rope",
            **stage,
        )
        if head is not None:
            head(model)
        return model

    def _wrap(self) -> None:
        setting = self.setting
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=setting.overlap or setting.gather,
            overlap_param_gather=setting.gather,
            align_param_gather=setting.gather,
            use_distributed_optimizer=setting.distributed_optimizer or setting.gather,
            delay_wgrad_compute=setting.delayed,
        )
        self.chunks = [
            DistributedDataParallel(self.config, ddp, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(self.chunks)
        ]
        for chunk in self.chunks:
            vars(chunk)["set_is_first_microbatch"] = self._is_first
            chunk.broadcast_params()
        no_sync = [chunk.no_sync for chunk in self.chunks]
        self.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        if setting.overlap and setting.chunks == 1 and setting.pp > 1:
            self.config.grad_sync_func = self.chunks[0].start_grad_sync
        if setting.gather:
            self.config.grad_sync_func = [chunk.start_grad_sync for chunk in self.chunks]
            self.config.param_sync_func = [chunk.start_param_sync for chunk in self.chunks]
        self.config.finalize_model_grads_func = finalize_model_grads

    def arguments(self, step: int = 0, **more: Any) -> dict[str, Any]:
        """Keyword arguments for one forward-backward call on the data of `step`."""
        setting = self.setting
        data = [iter(batches(setting, step)) for _ in self.chunks]
        return {
            "forward_step_func": self.forward_step,
            "data_iterator": data if len(data) > 1 else data[0],
            "model": self.chunks if len(self.chunks) > 1 else self.chunks[0],
            "num_microbatches": setting.num_microbatches,
            "seq_length": max(setting.lengths),
            "micro_batch_size": 2,
            "forward_only": False,
            **more,
        }

    def forward_step(self, data: Any, model: Any, *flags: Any) -> tuple[Any, Any]:
        """As `forward_step`, noting what Megatron's schedule tells of a micro-batch."""
        gpt: Any = get_attr_wrapped_model(model, "decoder", return_model_obj=True)
        number = gpt.decoder.layers[0].current_microbatch
        self.seen.append((gpt.vp_stage, number, self._first, *flags))
        self._first = False
        return forward_step(self.setting, data, model)

    def _is_first(self) -> None:
        """In place of ``set_is_first_microbatch``, which layers of low precision hear of."""
        self._first = True

    def zero(self) -> None:
        for chunk in self.chunks:
            if self.setting.ddp:
                chunk.zero_grad_buffer()
            chunk.zero_grad(set_to_none=True)

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {}
        for index, chunk in enumerate(self.chunks):
            for name, parameter in chunk.named_parameters():
                gradient = parameter.main_grad if self.setting.ddp else parameter.grad
                if gradient is not None:
                    found[f"{index}.{name}"] = gradient.clone()
        return found

    def step(self) -> dict[str, torch.Tensor]:
        """Update the weights; returns them."""
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {
            f"{index}.{name}": parameter.detach().clone()
            for index, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }


def batches(setting: Setting, step: int) -> list[torch.Tensor]:
    """Tokens [2, length + 1] of each micro-batch of this data-parallel rank."""
    generator = torch.Generator().manual_seed(
        1000 * step + parallel_state.get_data_parallel_rank() + 17 * setting.seed
    )
    return [
        torch.randint(
            0, VOCAB, (2, setting.lengths[m % len(setting.lengths)] + 1), generator=generator
        )
        for m in range(setting.num_microbatches)
    ]


def forward_step(setting: Setting, data: Any, model: Any) -> tuple[Any, Any]:
    tokens = next(data)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    length = inputs.shape[1]
    positions = torch.arange(length).expand(2, length)
    if setting.cp > 1:
        own = torch.arange(length).chunk(2 * setting.cp)
        rank = parallel_state.get_context_parallel_rank()
        keep = torch.cat([own[rank], own[-1 - rank]])
        inputs, labels, positions = inputs[:, keep], labels[:, keep], positions[:, keep]
    mask = torch.ones(length, length).tril().bool().logical_not()[None, None]
    output = model(inputs, positions, mask, labels=None if setting.value_head else labels)
    return output, partial(value_loss_of if setting.value_head else loss_of, setting)


def value_loss_of(setting: Setting, values: torch.Tensor) -> Any:
    return loss_of(setting, (values - 1.0).square())


def loss_of(setting: Setting, losses: torch.Tensor, non_loss_data: bool = False) -> Any:
    if non_loss_data:
        return losses.detach().clone()
    if setting.per_token or setting.three:
        count = torch.tensor(losses.numel(), dtype=torch.int)
        return losses.sum(), count, {"loss": losses.detach().sum()}
    return losses.mean(), {"loss": losses.detach().mean()}
