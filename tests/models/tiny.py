"""Small Hugging Face models in each supported family, with weights large enough to matter."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from rlhfuse.models.stage import Head, ModelConfig

FAMILIES = ("llama", "qwen2", "qwen3")


def tiny_config(
    family: str, *, tied: bool = False, layers: int = 4, width: int = 101
) -> ModelConfig:
    """Odd sizes on purpose: the MLP's width is no multiple of a vector."""
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[family]
    config: ModelConfig = kind(
        vocab_size=211,
        hidden_size=48,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=0,
        initializer_range=0.15,
    )
    return config


def save_tiny(
    path: Path,
    family: str,
    *,
    head: Head = Head.LM,
    tied: bool = False,
    seed: int = 0,
    width: int = 101,
) -> PreTrainedModel:
    """Write a model folder by transformers' own means and return the model."""
    torch.manual_seed(seed)
    config = tiny_config(family, tied=tied, width=width)
    model: PreTrainedModel
    if head is Head.LM:
        model = AutoModelForCausalLM.from_config(config)
    else:
        config.num_labels = 1
        model = AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide mistakes
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    model.eval()
    return model
