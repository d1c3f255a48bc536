"""A Megatron GPT model from a Hugging Face folder: configuration, layers, weights.

Attention is ours: it works on packed samples of different lengths without Transformer Engine.
The output layer holds its weights and passes hidden states on: losses compute log-probabilities
from those, so that logits of a whole micro-batch never exist.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from rlhfuse.megatron.hf_weights import load_hf
from rlhfuse.megatron.values import make_value_model
from rlhfuse.models.attention import PackedAttention
from rlhfuse.models.loading import load_stage
from rlhfuse.models.packed import PackedBatch
from rlhfuse.models.stage import EMBEDDING, LM_HEAD, Head, ModelConfig, ModelStage

Layers = Sequence[tuple[int, int]]


@dataclass
class Packing(PackedSeqParams):  # type: ignore[misc]  # Megatron has no types
    """Megatron's description of a packed batch, and the attention that goes with it.

    `cu_seqlens_q` is on the CPU, where Megatron reads it; the dummy rows are a sequence too.
    """

    attend: PackedAttention | None = None

    @classmethod
    def of(cls, batch: PackedBatch) -> "Packing":
        dummies = batch.num_rows - batch.num_tokens
        lengths = (*batch.lengths, dummies) if dummies else batch.lengths
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            attend=PackedAttention(batch.lengths, batch.cu_seqlens),
        )


class PackedCoreAttention(torch.nn.Module):
    """Megatron's core attention over a `Packing`: each sample by itself, causal."""

    def __init__(self, config: TransformerConfig, layer_number: int, **_: Any) -> None:
        """As Megatron builds it; what else it says (mask types, groups) has one value here."""
        super().__init__()
        self._layer = layer_number - 1
        self._scaling = float(config.kv_channels) ** -0.5

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        packed_seq_params: Packing,
        **_: Any,
    ) -> torch.Tensor:
        """query [rows, heads, d], key and value [rows, groups, d] -> [rows, heads, d]."""
        assert packed_seq_params.attend is not None
        q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
        return packed_seq_params.attend(self._layer, q, k, v, self._scaling)[0]


def transformer_config(
    hf: ModelConfig, *, layers: Layers, tp: int, dtype: torch.dtype, recompute: bool
) -> TransformerConfig:
    """Megatron's configuration of a Hugging Face model cut into `layers` by pipeline stage.

    Raises:
        ValueError: Megatron's GPT model has not what this model needs, or `tp` does not divide it.
    """
    _refuse_unsupported(hf, tp)
    last = len(layers) - 1
    layout = [
        ["embedding"] * (s == 0) + ["decoder"] * (stop - start) + ["loss"] * (s == last)
        for s, (start, stop) in enumerate(layers)
    ]
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=head_size(hf),
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=len(layers),
        pipeline_model_parallel_layout=layout if last else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Losses are divided by the mini-batch's tokens before: their gradients add up.
        calculate_per_token_loss=True,
        # Weights come from the folder, but it is initialization that marks parameters as cut.
        use_cpu_initialization=True,
        normalization="RMSNorm",
        layernorm_epsilon=hf.rms_norm_eps,
        qk_layernorm=isinstance(hf, Qwen3Config),
        add_bias_linear=False,
        add_qkv_bias=isinstance(hf, Qwen2Config),
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_comm=False,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def head_size(hf: ModelConfig) -> int:
    """Elements of one attention head."""
    given = getattr(hf, "head_dim", None)
    return int(given or hf.hidden_size // hf.num_attention_heads)


def _refuse_unsupported(hf: ModelConfig, tp: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if getattr(hf, name) % tp:
            raise ValueError(
                f"placement.tp={tp}: does not divide the model's {name} ({getattr(hf, name)})"
            )
    if hf.hidden_act != "silu":
        raise ValueError(
            f"actor.backend=megatron: hidden_act {hf.hidden_act!r} is not supported, only 'silu'"
        )
    biases = ["attention_bias"] * isinstance(hf, LlamaConfig | Qwen3Config) + ["mlp_bias"]
    for name in biases:
        if getattr(hf, name, False):
            raise ValueError(
                f"actor.backend=megatron: {name} is not supported; use actor.backend=torch"
            )


def padded_vocabulary(hf: ModelConfig, tp: int) -> int:
    """Rows of Megatron's embedding: equal parts for all tensor-parallel ranks."""
    return -(-hf.vocab_size // tp) * tp


def load_gpt(
    path: Path | str,
    *,
    head: Head,
    layers: Layers,
    tp: int,
    device: torch.device,
    dtype: torch.dtype,
    recompute: bool = False,
    new_head_seed: int | None = None,
) -> GPTModel:
    """This rank's stage of the model in a Hugging Face folder, in the parallel state of the moment.

    Raises:
        ValueError: the folder does not fit (see `load_stage`), or Megatron cannot have this model.
    """
    stage = parallel_state.get_pipeline_model_parallel_rank()
    first, last = stage == 0, stage == len(layers) - 1
    source = load_stage(
        path,
        head=head,
        layers=range(*layers[stage]),
        first=first,
        last=last,
        dtype=dtype,
        new_head_seed=new_head_seed,
    )
    hf = source.config
    spec = get_gpt_layer_local_spec(
        normalization="RMSNorm", qk_layernorm=isinstance(hf, Qwen3Config)
    )
    spec.submodules.self_attention.submodules.core_attention = PackedCoreAttention
    model = GPTModel(
        config=transformer_config(hf, layers=layers, tp=tp, dtype=dtype, recompute=recompute),
        transformer_layer_spec=spec,
        vocab_size=padded_vocabulary(hf, tp),
        max_sequence_length=hf.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=source.tied,
        position_embedding_type="rope",
    )
    if head is Head.SCALAR:
        make_value_model(model)
    model.rotary_pos_emb.inv_freq = _frequencies(source)
    load_hf(model, _tensors(source), parallel_state.get_tensor_model_parallel_group())
    if last:
        model.output_layer.forward = _pass_on
    return model.to(device)


def _frequencies(source: ModelStage) -> torch.Tensor:
    """Hugging Face's own, so that every scaling that it knows is Megatron's too."""
    scale: Any = source.rotary.attention_scaling
    if scale != 1.0:
        raise ValueError(
            f"actor.backend=megatron: rope type with attention scaling {scale} (yarn) is not "
            "supported; use actor.backend=torch"
        )
    frequencies = source.rotary.get_buffer("inv_freq")
    return frequencies.float().clone()


def _tensors(source: ModelStage) -> dict[str, torch.Tensor]:
    found = {name: parameter.detach() for name, parameter in source.named_parameters()}
    if source.tied and LM_HEAD in found:
        found[EMBEDDING] = found.pop(LM_HEAD)  # the last stage's copy
    return found


def _pass_on(
    input_: torch.Tensor,
    weight: torch.Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[torch.Tensor, None]:
    """In place of an output layer's forward: (output, bias)."""
    return input_, None


def real_rows(vocab_size: int, part: int, tp_group: dist.ProcessGroup) -> int:
    """Rows of this rank's part of the output layer that stand for a token, not for padding."""
    return max(0, min(part, vocab_size - tp_group.rank() * part))
