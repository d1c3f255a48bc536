"""Weights, log-probabilities and losses of Megatron models equal Hugging Face's and ours."""

from functools import partial
from typing import Any

import pytest
import torch

pytest.importorskip("megatron.core")

from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from rlhfuse.algorithms.losses import PolicyInputs, PolicyLossSettings, policy_loss, value_loss
from rlhfuse.kernels.logprob import token_logprob
from rlhfuse.megatron.cpu import on_cpu
from rlhfuse.megatron.hf_weights import hf_tensors, load_hf
from rlhfuse.megatron.logprobs import vocab_parallel_logprob
from rlhfuse.megatron.losses import PpoBatch, actor_loss_func, critic_loss_func
from tests.training.ranks import run_ranks

VOCAB = 64
SHAPE: Any = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}


def families() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "llama, tied": LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8)),
    }


def megatron_model(hf: Any, tp: int) -> GPTModel:
    qwen3 = hf.config.model_type == "qwen3"
    config = TransformerConfig(
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=8,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp,
        normalization="RMSNorm",
        layernorm_epsilon=hf.config.rms_norm_eps,
        qk_layernorm=qwen3,
        add_bias_linear=False,
        add_qkv_bias=hf.config.model_type == "qwen2",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    return GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            normalization="RMSNorm", qk_layernorm=qwen3
        ),
        vocab_size=VOCAB,
        max_sequence_length=32,
        parallel_output=False,
        share_embeddings_and_output_weights=hf.config.tie_word_embeddings,
        position_embedding_type="rope",
    )


def convert(tp: int, rank: int) -> dict[str, tuple[float, bool]]:
    """Largest difference of logits, and whether weights come back as they were."""
    found = {}
    with on_cpu():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp)
        group = parallel_state.get_tensor_model_parallel_group()
        for name, hf in families().items():
            state = {k: v.detach() for k, v in hf.state_dict().items()}
            model = megatron_model(hf, tp)
            load_hf(model, state, group)
            tokens = torch.arange(20).reshape(2, 10) * 3 % VOCAB
            mask = torch.ones(10, 10).tril().bool().logical_not()[None, None]
            with torch.no_grad():
                ours = model(tokens, torch.arange(10).expand(2, 10), mask)
                theirs = hf(tokens).logits
            back = hf_tensors(model, group)
            if hf.config.tie_word_embeddings:  # type: ignore[union-attr]
                state.pop("lm_head.weight", None)
            equal = back.keys() == state.keys() and all(
                torch.equal(back[key], state[key]) for key in state
            )
            found[name] = (float((ours - theirs).abs().max()), equal)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2])
def test_hugging_face_weights_in_and_out(tp: int) -> None:
    for found in run_ranks(tp, partial(convert, tp), limit_s=60):
        for name, (difference, equal) in found.items():
            assert equal, f"{name}: weights do not come back"
            assert difference < 1e-5, f"{name}: logits differ by {difference}"


def logprobs(rank: int) -> list[tuple[float, float]]:
    """Differences from Megatron's cross entropy and from our kernel on the whole vocabulary, of
    values and of gradients."""
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    generator = torch.Generator().manual_seed(0)
    whole = 3 * torch.randn(3, 7, VOCAB, generator=generator)
    labels = torch.randint(0, VOCAB, (3, 7), generator=generator)
    weights = torch.randn(3, 7, generator=generator)
    found = []

    def run(logits: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        (gradient,) = torch.autograd.grad((values * weights).sum(), logits)
        return values.detach(), gradient

    part = whole.chunk(2, -1)[rank].clone().requires_grad_()
    ours = run(part, vocab_parallel_logprob(part, labels, group))
    theirs = run(part, -tensor_parallel.vocab_parallel_cross_entropy(part.clone(), labels))
    full = whole.clone().requires_grad_()
    rows = token_logprob(full.reshape(-1, VOCAB), labels.reshape(-1)).logprob.reshape(3, 7)
    value, gradient = run(full, rows)
    kernel = value, gradient.chunk(2, -1)[rank]
    cool = run(part, vocab_parallel_logprob(part, labels, group, temperature=0.7))
    rows = token_logprob(full.reshape(-1, VOCAB), labels.reshape(-1), temperature=0.7).logprob
    cool_value, cool_gradient = run(full, rows.reshape(3, 7))
    pairs = [(ours, theirs), (ours, kernel)]
    pairs.append((cool, (cool_value, cool_gradient.chunk(2, -1)[rank])))
    for one, other in pairs:
        value_gap, gradient_gap = (
            float((a - b).abs().max()) for a, b in zip(one, other, strict=True)
        )
        found.append((value_gap, gradient_gap))
    return found


@pytest.mark.slow
def test_vocabulary_parallel_logprobs_equal_megatrons_cross_entropy_and_our_kernel() -> None:
    for found in run_ranks(2, logprobs, limit_s=60):
        for value_gap, gradient_gap in found:
            assert value_gap < 2e-6
            assert gradient_gap < 2e-6


def test_padded_losses_equal_the_packed_ones() -> None:
    generator = torch.Generator().manual_seed(0)
    response = torch.zeros(3, 8, dtype=torch.bool)
    for row, (start, stop) in enumerate(((2, 5), (1, 8), (4, 6))):
        response[row, start:stop] = True

    def column() -> torch.Tensor:
        return torch.randn(3, 8, generator=generator)

    batch = PpoBatch(
        tokens=torch.randint(0, VOCAB, (3, 8), generator=generator),
        response=response,
        old_logprobs=column() - 3,
        advantages=column(),
        old_values=column(),
        returns=column(),
    )
    logits = torch.randn(3, 8, VOCAB, generator=generator)
    loss, _ = actor_loss_func(batch, PolicyLossSettings(), normalizer=12.0, num_microbatches=5)(
        logits
    )
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
    starts = torch.tensor([0, 3, 10, 12], dtype=torch.int32)
    expected = policy_loss(
        PolicyInputs(
            logprobs=chosen[response[:, 1:]],
            old_logprobs=batch.old_logprobs[response],
            advantages=batch.advantages[response],
            cu_seqlens=starts,
        ),
        PolicyLossSettings(),
        normalizer=12.0,
    ).loss
    torch.testing.assert_close(loss, 5 * expected, rtol=1e-6, atol=1e-7)
    values = torch.randn(3, 8, 1, generator=generator)
    loss, _ = critic_loss_func(batch, clip=0.2, normalizer=12.0, num_microbatches=5)(values)
    expected = value_loss(
        values[:, :-1, 0][response[:, 1:]],
        batch.old_values[response],
        batch.returns[response],
        starts,
        clip=0.2,
        normalizer=12.0,
    ).loss
    torch.testing.assert_close(loss, 5 * expected, rtol=1e-6, atol=1e-7)
