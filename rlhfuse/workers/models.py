"""What a rollout worker holds: the models of its scorers, and the engine over the actor's."""

import torch

from rlhfuse import messages as m
from rlhfuse.config import Config
from rlhfuse.engines.base import Engine
from rlhfuse.engines.torch_engine import TorchEngine
from rlhfuse.engines.vllm_adapter import VllmEngine
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head, ModelStage


def load_models(
    config: Config, device: torch.device, dtype: torch.dtype
) -> dict[m.Role, ModelStage]:
    """One whole model per scored role; the actor's is the engine's own."""
    models: dict[m.Role, ModelStage] = {
        "actor": load_model(config.actor.path, head=Head.LM, device=device, dtype=dtype)
    }
    if config.uses_critic:
        # Only the shape matters here: the weights come from the training workers.
        models["critic"] = load_model(
            config.critic.path,
            head=Head.SCALAR,
            device=device,
            dtype=dtype,
            new_head_seed=config.critic.init_seed,
        )
    if config.uses_reference:
        path = config.reference.path or config.actor.path
        models["reference"] = load_model(path, head=Head.LM, device=device, dtype=dtype)
    if config.reward.path:
        models["reward"] = load_model(
            config.reward.path, head=Head.SCALAR, device=device, dtype=dtype
        )
    for model in models.values():
        model.requires_grad_(False).eval()
    return models


def make_engine(config: Config, model: ModelStage) -> Engine:
    """The engine that the configuration names, over the actor as a rollout worker loaded it."""
    rollout = config.rollout
    max_len = config.data.max_prompt_length + rollout.response_length
    exact = None if rollout.exactness == "auto" else rollout.exactness == "token"
    if rollout.engine == "vllm":
        return VllmEngine(
            model,
            config.actor.path,
            max_num_seqs=rollout.max_num_seqs,
            max_model_len=max_len,
            cache_tokens=rollout.cache_tokens or None,
            exact=exact,
            keyed=rollout.presence_penalty != 0 or rollout.frequency_penalty != 0,
            options=rollout.vllm,
        )
    assert rollout.engine == "torch", "auto is decided before workers start"
    return TorchEngine(
        model,
        max_num_seqs=rollout.max_num_seqs,
        max_model_len=max_len,
        cache_tokens=rollout.cache_tokens or None,
        exact=exact,
    )
