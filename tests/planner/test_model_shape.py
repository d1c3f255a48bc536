"""Shapes from configs: as many parameters as the real models have."""

import json
from pathlib import Path

import pytest

from rlhfuse.model_shape import KNOWN, from_config, shape_of

SIZES = {"hidden_size": 96, "intermediate_size": 200, "num_hidden_layers": 3,
         "num_attention_heads": 6, "vocab_size": 1000}  # fmt: skip
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "mistral": {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
    "qwen2": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "qwen3": {**SIZES, "num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": False},
    "gemma": {**SIZES, "num_key_value_heads": 1, "head_dim": 32},
    "gpt2": {"n_embd": 96, "n_layer": 3, "n_head": 6, "vocab_size": 1000, "n_positions": 128},
    "opt": {"hidden_size": 96, "ffn_dim": 200, "num_hidden_layers": 3, "num_attention_heads": 6,
            "vocab_size": 1000, "max_position_embeddings": 128, "word_embed_proj_dim": 96},
    "gpt_neox": {**SIZES, "tie_word_embeddings": False},
    "starcoder2": {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_real_model(family: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family, **FAMILIES[family])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    real = sum(p.numel() for p in model.parameters())
    assert from_config(config.to_dict(), family).num_parameters() == pytest.approx(real, rel=0.02)


def test_known_models_have_their_published_sizes() -> None:
    billions = {m.name: m.num_parameters() / 1e9 for m in KNOWN}
    published = {"llama-7b": 6.74, "llama-13b": 13.02, "llama-33b": 32.53, "llama-65b": 65.29,
                 "llama-3-8b": 8.03, "llama-3-70b": 70.55, "qwen2.5-7b": 7.62,
                 "qwen2.5-72b": 72.71}  # fmt: skip
    for name, size in published.items():
        assert billions[name] == pytest.approx(size, rel=0.003)


def test_a_folder_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **SIZES}))
    shape = shape_of(str(tmp_path))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (3, 6, 16)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({**SIZES, "num_experts": 8}, "num_experts=8"),
        ({"hidden_size": 96}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_planned_is_named(config: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        from_config(config, "it")


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="llama-33b"):
        shape_of("no/such/folder")
