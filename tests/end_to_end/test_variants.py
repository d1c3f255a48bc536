"""Other models, estimators and placements through whole runs, fused and serial alike."""

from pathlib import Path

import msgspec
import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from rlhfuse.config import Config
from rlhfuse.launch import verify_run
from rlhfuse.quickstart.tokenizer import train_tokenizer
from tests.end_to_end.tiny_run import make_assets, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]
replace = msgspec.structs.replace

BYTE_VOCABULARY = 300  # bytes, and room for special tokens
SHAPE = {
    "vocab_size": BYTE_VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
    "num_labels": 1,
}


def _config(folder: Path, family: str, ray_address: str) -> Config:
    _assets(folder / "assets", family)
    config = tiny_config(folder / "assets", folder, num_devices=2, ray_address=ray_address)
    return replace(config, data=replace(config.data, max_prompt_length=32))


def _assets(folder: Path, family: str) -> None:
    """The tiny run's files, with policy and reward model of another family, and a tokenizer of
    the kind that these families have."""
    make_assets(folder)
    tokenizer = train_tokenizer(["w1 w2"], BYTE_VOCABULARY, 512)
    torch.manual_seed(2)
    models: tuple[PreTrainedModel, PreTrainedModel]
    if family == "qwen2":  # embeddings tied over the first and the last pipeline stage
        two = Qwen2Config.from_dict({**SHAPE, "tie_word_embeddings": True})
        models = (Qwen2ForCausalLM(two), Qwen2ForSequenceClassification(two))
    else:
        three = Qwen3Config.from_dict({**SHAPE, "tie_word_embeddings": False})
        models = (Qwen3ForCausalLM(three), Qwen3ForSequenceClassification(three))
    for name, model in zip(("policy", "reward"), models, strict=True):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _with(config: Config, estimator: str) -> Config:
    """Another estimator, and two responses to each prompt."""
    return replace(
        config,
        algorithm=replace(config.algorithm, adv_estimator=estimator),
        rollout=replace(config.rollout, n=2),
        data=replace(config.data, train_batch_size=8),
    )


def _holds(config: Config, folder: Path) -> None:
    result = verify_run(config, 2, folder)
    assert result.first_difference is None
    assert result.equal


def test_qwen2_with_tied_embeddings_and_without_a_critic(tmp_path: Path, ray_address: str) -> None:
    """On two data-parallel replicas; old log-probabilities are the update's own."""
    config = _with(_config(tmp_path, "qwen2", ray_address), "rloo")
    config = replace(
        config,
        placement=replace(config.placement, actor_pp=1),
        rollout=replace(config.rollout, old_log_probs="update"),
        algorithm=replace(config.algorithm, use_kl_in_reward=False),
        actor=replace(config.actor, use_kl_loss=True),
    )
    _holds(config, tmp_path)


def test_qwen3_with_adapters_warm_up_adaptive_kl_and_a_critic_of_two_replicas(
    tmp_path: Path, ray_address: str
) -> None:
    config = _config(tmp_path, "qwen3", ray_address)
    algorithm = replace(
        config.algorithm,
        critic_warmup=1,
        kl_penalty="k3",
        kl_ctrl=replace(config.algorithm.kl_ctrl, type="adaptive"),
    )
    config = replace(
        config,
        algorithm=algorithm,
        placement=replace(config.placement, critic_pp=1),
        actor=replace(config.actor, lora_rank=4, lora_dropout=0.1),
    )
    _holds(config, tmp_path)


def test_tied_embeddings_over_two_stages(tmp_path: Path, ray_address: str) -> None:
    config = _config(tmp_path, "qwen2", ray_address)
    _holds(config, tmp_path)


@pytest.mark.parametrize("estimator", ["gae", "reinforce_plus_plus"])
def test_one_device_and_other_estimators(tmp_path: Path, ray_address: str, estimator: str) -> None:
    make_assets(tmp_path / "assets")
    config = tiny_config(tmp_path / "assets", tmp_path, num_devices=1, ray_address=ray_address)
    config = _with(config, estimator)
    if estimator != "gae":
        # On one device batches do not depend on fusion, so neither do the engine's own numbers, nor
        # those of bfloat16, whose near ties batches would decide.
        config = replace(
            config,
            placement=replace(config.placement, dtype="bfloat16"),
            rollout=replace(config.rollout, old_log_probs="engine"),
            algorithm=replace(config.algorithm, tis="on"),
        )
    config = replace(
        config,
        actor=replace(config.actor, ppo_epochs=2, gradient_checkpointing=True),
        critic=replace(config.critic, ppo_epochs=2),
    )
    _holds(config, tmp_path)
