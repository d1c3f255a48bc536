"""Rules between the keys of a `Config`; files are looked at by `file_check`."""

import math
import os
from collections.abc import Iterator

import msgspec

from rlhfuse.batch_sizes import data_parallel, trained_models
from rlhfuse.config import Config
from rlhfuse.generation_check import penalties, vllm
from rlhfuse.group_training import why_groups_wait
from rlhfuse.logprob_sources import why_old_wait, why_reference_stays


def check(config: Config) -> None:
    """Raise a `ValueError` that names every broken rule between keys; touches no file."""
    broken = [problem for rule in _RULES for problem in rule(config)]
    if broken:
        raise ValueError("; ".join(broken))


def check_for_plan(config: Config) -> None:
    """As `check`, of what a prediction depends on: no data, no devices, any engine."""
    broken = [p for rule in (_finite, _models, _reward, _batches) for p in rule(config)]
    if broken:
        raise ValueError("; ".join(broken))


def _finite(config: Config) -> Iterator[str]:
    def walk(value: object, place: str) -> Iterator[str]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from walk(item, f"{place}.{key}" if place else key)
        elif isinstance(value, list | tuple):
            for index, item in enumerate(value):
                yield from walk(item, f"{place}.{index}")
        elif isinstance(value, float) and not math.isfinite(value):
            yield f"{place}: {value} is not a finite number"

    yield from walk(msgspec.to_builtins(config), "")


def _models(config: Config) -> Iterator[str]:
    if not config.actor.path:
        yield "actor.path: is empty, give the folder of a Hugging Face model"
    if config.uses_critic and not config.critic.path:
        usual = f" (often the reward model: critic.path={config.reward.path})"
        hint = usual if config.reward.path else ""
        yield (
            "critic.path: is empty, but algorithm.adv_estimator is gae; "
            f"give the folder of a Hugging Face model{hint}"
        )
    for role, model in trained_models(config):
        if model.lora_dropout and not model.lora_rank:
            yield f"{role}.lora_dropout: is of adapters, give {role}.lora_rank too, or use 0"
    if config.algorithm.critic_warmup and not config.uses_critic:
        name = config.algorithm.adv_estimator
        yield f"algorithm.critic_warmup: there is no critic with adv_estimator {name}, set it to 0"


def _reward(config: Config) -> Iterator[str]:
    reward = config.reward
    given = {
        "reward.path": bool(reward.path),
        "reward.function": reward.function is not None,
        "reward.url": bool(reward.url),
    }
    count = sum(given.values())
    if count == 0:
        yield f"reward: no source of scores, give one of {', '.join(given)}"
    if count > 1:
        both = " and ".join(name for name, is_given in given.items() if is_given)
        yield f"reward: {both} exclude each other, keep one"
    if reward.url and not reward.url.startswith(("http://", "https://")):
        yield f"reward.url: {reward.url!r} must begin with http:// or https://"
    if reward.auth_env and not reward.url:
        yield "reward.auth_env: has an effect only with reward.url"


def _batches(config: Config) -> Iterator[str]:
    prompts = config.data.train_batch_size
    longest = config.data.max_prompt_length + config.rollout.response_length
    for role, model in trained_models(config):
        size = model.ppo_mini_batch_size
        replicas = data_parallel(config, role)
        if prompts % size:
            yield (
                f"data.train_batch_size: {prompts} prompts do not divide into mini-batches of "
                f"{size} ({role}.ppo_mini_batch_size), choose one of {_divisors(prompts)}"
            )
        least = max(1, model.num_microbatches) * replicas
        if least > size * config.rollout.n:
            over = f" on each of {replicas} data-parallel replicas" if replicas > 1 else ""
            yield (
                f"{role}.num_microbatches: {max(1, model.num_microbatches)}{over} is more than the "
                f"{size * config.rollout.n} samples of a mini-batch"
            )
        if model.num_microbatches == 0 and model.ppo_max_token_len_per_gpu < longest:
            yield (
                f"{role}.ppo_max_token_len_per_gpu: {model.ppo_max_token_len_per_gpu} tokens do "
                f"not hold one sample of data.max_prompt_length + rollout.response_length = "
                f"{longest} tokens"
            )
    for key in ("ppo_mini_batch_size", "ppo_epochs"):
        ours, theirs = getattr(config.actor, key), getattr(config.critic, key)
        if config.uses_critic and ours != theirs:
            yield (
                f"critic.{key}: {theirs}, but actor.{key} is {ours}; both models step together "
                "and need the same"
            )


def _sampling(config: Config) -> Iterator[str]:
    rollout, estimator = config.rollout, config.algorithm.adv_estimator
    if estimator in ("grpo", "rloo") and rollout.n < 2:
        yield f"rollout.n: {estimator} compares the responses of a prompt and needs 2 or more"
    if config.algorithm.replay_truncation == "on" and config.truncates and config.why_no_replay:
        yield (
            f"algorithm.replay_truncation: on is not possible, {config.why_no_replay}; use auto "
            "or off"
        )
    if rollout.min_response_length > rollout.response_length:
        yield (
            f"rollout.min_response_length: {rollout.min_response_length} is more than "
            f"rollout.response_length {rollout.response_length}"
        )
    longest = config.data.max_prompt_length + rollout.response_length
    if rollout.cache_tokens and rollout.cache_tokens < longest:
        yield (
            f"rollout.cache_tokens: {rollout.cache_tokens} do not hold one sample of {longest} "
            "tokens (data.max_prompt_length + rollout.response_length)"
        )
    reason = why_old_wait(config)
    if rollout.old_log_probs == "update" and reason:
        yield f"rollout.old_log_probs: update, but {reason}; choose recompute"
    if 0 < config.actor.clip_ratio_c <= 1:
        yield f"actor.clip_ratio_c: {config.actor.clip_ratio_c} must be above 1, or 0 for off"
    if config.algorithm.tis_floor >= config.algorithm.tis_cap:
        yield (
            f"algorithm.tis_floor: {config.algorithm.tis_floor} must be below "
            f"algorithm.tis_cap {config.algorithm.tis_cap}"
        )


def _devices(config: Config) -> Iterator[str]:
    devices = config.placement.num_devices // config.placement.tp
    over = f" / placement.tp {config.placement.tp}" if config.placement.tp > 1 else ""
    for name, stages in (
        ("actor_pp", config.placement.actor_pp),
        ("critic_pp", config.placement.critic_pp),
    ):
        if stages and devices % stages:
            yield (
                f"placement.{name}: {stages} pipeline stages do not divide "
                f"placement.num_devices {config.placement.num_devices}{over}, choose one of "
                f"{_divisors(devices)}, or 0 for all"
            )
    if config.fusion.intra_stage == "on" and not config.uses_critic:
        name = config.algorithm.adv_estimator
        yield (
            f"fusion.intra_stage: on needs a critic to fuse the actor with, and there is none with "
            f"adv_estimator {name}; use auto"
        )


def _backend(config: Config) -> Iterator[str]:
    tp = config.placement.tp
    if config.actor.backend == "torch":
        if tp > 1:
            yield (
                f"placement.tp: {tp} tensor-parallel devices need actor.backend: megatron; set it "
                "to 1"
            )
        return
    for role, model in trained_models(config):
        if model.lora_rank:
            yield f"{role}.lora_rank: adapters are not possible with actor.backend: megatron, use 0"
    devices = config.placement.num_devices
    if devices % tp:
        yield (
            f"placement.tp: {tp} tensor-parallel devices do not divide placement.num_devices "
            f"{devices}, choose one of {_divisors(devices)}"
        )


def _data(config: Config) -> Iterator[str]:
    data, trainer = config.data, config.trainer
    if not data.train_files:
        yield "data.train_files: is empty, give JSONL or Parquet files"
    names = [entry.name for entry in data.validation]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"data.validation: two sets have the name {name!r}"
    for index, entry in enumerate(data.validation):
        if not entry.files:
            yield f"data.validation.{index}.files: is empty, give JSONL or Parquet files"
        if entry.n > 1 and entry.temperature == 0:
            yield (
                f"data.validation.{index}.n: {entry.n} greedy responses are all the same, "
                "set temperature above 0 or n to 1"
            )
    if trainer.test_freq and not data.validation:
        yield "trainer.test_freq: there is no validation set (data.validation), set it to 0"
    if trainer.best_metric and not data.validation:
        yield "trainer.best_metric: there is no validation set (data.validation)"
    for name in ("project_name", "experiment_name"):
        value = getattr(trainer, name)
        if value in ("", ".", "..") or "/" in value or os.sep in value:
            yield f"trainer.{name}: {value!r} must be one folder's name"


def _fusion(config: Config) -> Iterator[str]:
    reason = why_reference_stays(config)
    if config.fusion.reference == "on" and reason:
        yield f"fusion.reference: on, but {reason}; set it to auto"
    reason = why_groups_wait(config)
    if config.fusion.early_training == "on" and reason:
        yield f"fusion.early_training: on, but {reason}; set it to auto"


_RULES = (
    _finite,
    _models,
    _reward,
    _batches,
    _sampling,
    vllm,
    penalties,
    _devices,
    _backend,
    _data,
    _fusion,
)


def _divisors(number: int) -> str:
    found = [size for size in range(1, min(number, 4096) + 1) if number % size == 0]
    return ", ".join(str(size) for size in found)
