"""From a configuration to a run that could start: everything checked, nothing started."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from rlhfuse.batch_sizes import total_steps
from rlhfuse.config import Config, TrainedModelConfig
from rlhfuse.config_check import check
from rlhfuse.data import (
    Prompt,
    PromptStream,
    Tokenizer,
    check_tokenizers,
    encode_prompts,
    load_rows,
    load_tokenizer,
)
from rlhfuse.engines import vllm_setup
from rlhfuse.file_check import check_files
from rlhfuse.logprob_sources import why_reference_stays
from rlhfuse.models.loading import load_config, load_trained_config
from rlhfuse.models.partition import partition, stage_costs
from rlhfuse.models.stage import ModelConfig
from rlhfuse.placement import StagePlacement, pipeline_ranks, reference_ranks, role_of
from rlhfuse.update_plan import StageCosts, forward_only

# Before the first measurement only ratios matter: a backward pass costs twice a forward pass,
# half of it for weights.
_BACKWARD = 2.0
_WEIGHT = 1.0
_SECONDS_PER_PARAMETER = 1e-10


@dataclass(frozen=True)
class Resolved:
    """A run, ready to start. `total_steps`: PPO iterations; `optimizer_steps`: of the actor."""

    config: Config
    tokenizer: Tokenizer
    stop_token_ids: tuple[int, ...]
    prompts: tuple[Prompt, ...]
    validation_prompts: Mapping[str, tuple[Prompt, ...]]
    pipelines: dict[str, StagePlacement]  # by name: replicas apart
    reference: dict[str, StagePlacement]  # forward-only pipelines beside the actor's, if any
    costs: dict[str, StageCosts]  # by role
    total_steps: int
    optimizer_steps: int

    def stream(self) -> PromptStream[Prompt]:
        """The training prompts, from the first batch on."""
        batch = self.config.data.train_batch_size
        seed = self.config.trainer.seed
        return PromptStream(self.prompts, batch, seed, self.config.data.shuffle)

    def decode(self, tokens: npt.NDArray[np.int32]) -> str:
        """Text of token ids, without special tokens."""
        text = self.tokenizer.decode(tokens.tolist(), skip_special_tokens=True)
        assert isinstance(text, str)
        return text


def resolve(config: Config) -> Resolved:
    """Check the configuration, the models and the data, and place the pipelines.

    Raises:
        ValueError: the first thing that is wrong: its place, its value, the way out.
    """
    check(config)
    check_files(config)
    config = _with_engine(config)
    models = {"actor": load_trained_config(config.actor.path)}
    if config.uses_critic:
        models["critic"] = load_trained_config(config.critic.path)
    tokenizer = load_tokenizer(config.actor.path)
    check_tokenizers(config, tokenizer)
    data = config.data
    prompts = encode_prompts(load_rows(data.train_files, data), tokenizer, data)
    validation = {
        v.name: encode_prompts(load_rows(v.files, data)[: v.max_samples or None], tokenizer, data)
        for v in data.validation
    }
    ranks = pipeline_ranks(config)
    beside = {} if why_reference_stays(config) else reference_ranks(ranks)
    if beside:
        models["reference"] = load_config(config.reference.path or config.actor.path)
    sizes = {role_of(name): len(r) for name, r in (ranks | beside).items()}
    layers = {role: _layers(model, role, sizes[role]) for role, model in models.items()}
    steps = total_steps(config, len(prompts))
    per_step = _updates(config.actor, config.data.train_batch_size)
    return Resolved(
        config=config,
        tokenizer=tokenizer,
        stop_token_ids=_stop_token_ids(config, tokenizer),
        prompts=tuple(prompts),
        validation_prompts={name: tuple(found) for name, found in validation.items()},
        pipelines={name: StagePlacement(r, layers[role_of(name)]) for name, r in ranks.items()},
        reference={name: StagePlacement(r, layers[role_of(name)]) for name, r in beside.items()},
        costs={role: _guessed_costs(model, role, layers[role]) for role, model in models.items()},
        total_steps=steps,
        optimizer_steps=steps * per_step,
    )


def _with_engine(config: Config) -> Config:
    """`rollout.engine: auto` decided: vLLM where it is installed. What runs is in the run's
    config.yaml, so that it resumes with the same engine."""
    engine = config.rollout.engine
    if engine == "auto":
        engine = "torch" if vllm_setup.installed_version() is None else "vllm"
    if engine == "vllm":
        vllm_setup.prepare()
    replace = msgspec.structs.replace
    return replace(config, rollout=replace(config.rollout, engine=engine))


def _updates(model: TrainedModelConfig, prompts: int) -> int:
    return model.ppo_epochs * (prompts // model.ppo_mini_batch_size)


def _stop_token_ids(config: Config, tokenizer: Tokenizer) -> tuple[int, ...]:
    ids = set(config.rollout.stop_token_ids)
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return tuple(sorted(ids))


def _layers(model: ModelConfig, role: str, num_stages: int) -> tuple[tuple[int, int], ...]:
    head_rows = 1 if role == "critic" else model.vocab_size
    costs = stage_costs(model, head_rows=head_rows)
    cut = partition(
        model.num_hidden_layers,
        num_stages,
        layer_cost=costs.layer,
        embed_cost=costs.embed,
        head_cost=costs.head,
    )
    return tuple((part.start, part.stop) for part in cut)


def _guessed_costs(
    model: ModelConfig, role: str, layers: tuple[tuple[int, int], ...]
) -> StageCosts:
    costs = stage_costs(model, head_rows=1 if role == "critic" else model.vocab_size)
    forward = [(end - first) * costs.layer for first, end in layers]
    forward[0] += costs.embed
    forward[-1] += costs.head
    scaled = tuple(cost * _SECONDS_PER_PARAMETER for cost in forward)
    if role == "reference":
        return forward_only(scaled)
    return StageCosts(
        forward=scaled,
        backward=tuple(_BACKWARD * cost for cost in scaled),
        weight=tuple(_WEIGHT * cost for cost in scaled),
    )
