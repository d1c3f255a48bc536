"""What verl's configuration keys mean here. Names and defaults are those of verl 0.9.1
(Apache-2.0; `tests/importers/verl_defaults.yaml` repeats them, so that a test holds both).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

AR = "actor_rollout_ref"


class Unsafe(ValueError):
    """A value that would change what is computed, and that we do not have."""


@dataclass(frozen=True, slots=True)
class From:
    """The default is the value of another verl key."""

    key: str


@dataclass(frozen=True, slots=True)
class Rule:
    """verl's `key` becomes our `target`; `convert` raises `Unsafe` for values we do not have."""

    key: str
    target: str
    default: object = None
    convert: Callable[[object], object] | None = None


def _words(**table: object) -> Callable[[object], object]:
    def convert(value: object) -> object:
        if str(value) not in table:
            raise Unsafe(f"not available here; there is: {', '.join(table)}")
        return table[str(value)]

    return convert


def _off_below_zero(value: object) -> object:
    return max(value, 0) if isinstance(value, int) else 0


def _home(value: object) -> object:
    if isinstance(value, list):
        return [_home(item) for item in value]
    return str(Path(value).expanduser()) if isinstance(value, str) else value


def _loggers(value: object) -> object:
    names = value if isinstance(value, list) else [value]
    ours = {"console": "console", "wandb": "wandb", "tensorboard": "tensorboard", "file": "jsonl"}
    unknown = [name for name in names if name not in ours]
    if unknown:
        raise Unsafe(f"no such logger here: {', '.join(map(str, unknown))}")
    return list(dict.fromkeys(["jsonl", *(ours[str(name)] for name in names)]))


KL = _words(kl="k1", k1="k1", mse="k2", k2="k2", low_var_kl="k3", k3="k3")
LOSS = _words(
    **{
        name: name
        for name in (
            "token-mean",
            "seq-mean-token-sum",
            "seq-mean-token-mean",
            "seq-mean-token-sum-norm",
        )
    }
)
ESTIMATORS = _words(**{name: name for name in ("gae", "grpo", "rloo", "reinforce_plus_plus")})


def _optim(prefix: str, ours: str, lr: float) -> tuple[Rule, ...]:
    return (
        Rule(f"{prefix}.lr", f"{ours}.lr", lr),
        Rule(f"{prefix}.betas", f"{ours}.betas", [0.9, 0.999]),
        Rule(f"{prefix}.weight_decay", f"{ours}.weight_decay", 0.01),
        Rule(f"{prefix}.clip_grad", f"{ours}.clip_grad", 1.0),
        Rule(f"{prefix}.lr_warmup_steps", f"{ours}.lr_warmup_steps", -1, _off_below_zero),
        Rule(
            f"{prefix}.lr_scheduler_type",
            f"{ours}.lr_scheduler",
            "constant",
            _words(constant="constant", cosine="cosine"),
        ),
        Rule(f"{prefix}.min_lr_ratio", f"{ours}.min_lr_ratio", 0.0),
    )


MODEL = "~/models/deepseek-llm-7b-chat"
RULES: tuple[Rule, ...] = (
    Rule(f"{AR}.model.path", "actor.path", MODEL, _home),
    *_optim(f"{AR}.actor.optim", "actor.optim", 1e-6),
    Rule(f"{AR}.actor.ppo_mini_batch_size", "actor.ppo_mini_batch_size", 256),
    Rule(f"{AR}.actor.ppo_epochs", "actor.ppo_epochs", 1),
    Rule(f"{AR}.actor.ppo_max_token_len_per_gpu", "actor.ppo_max_token_len_per_gpu", 16384),
    Rule(f"{AR}.model.enable_gradient_checkpointing", "actor.gradient_checkpointing", True),
    Rule(f"{AR}.actor.clip_ratio", "actor.clip_ratio", 0.2),
    Rule(f"{AR}.actor.clip_ratio_low", "actor.clip_ratio_low", 0.2),
    Rule(f"{AR}.actor.clip_ratio_high", "actor.clip_ratio_high", 0.2),
    Rule(f"{AR}.actor.clip_ratio_c", "actor.clip_ratio_c", 3.0),
    Rule(f"{AR}.actor.loss_agg_mode", "actor.loss_agg_mode", "token-mean", LOSS),
    Rule(f"{AR}.actor.loss_scale_factor", "actor.loss_scale_factor", None, _off_below_zero),
    Rule(f"{AR}.actor.entropy_coeff", "actor.entropy_coeff", 0),
    Rule(f"{AR}.actor.use_kl_loss", "actor.use_kl_loss", False),
    Rule(f"{AR}.actor.kl_loss_coef", "actor.kl_loss_coef", 0.001),
    Rule(f"{AR}.actor.kl_loss_type", "actor.kl_loss_type", "low_var_kl", KL),
    Rule("critic.model.path", "critic.path", MODEL, _home),
    *_optim("critic.optim", "critic.optim", 1e-5),
    Rule(
        "critic.ppo_mini_batch_size",
        "critic.ppo_mini_batch_size",
        From(f"{AR}.actor.ppo_mini_batch_size"),
    ),
    Rule("critic.ppo_epochs", "critic.ppo_epochs", From(f"{AR}.actor.ppo_epochs")),
    Rule("critic.ppo_max_token_len_per_gpu", "critic.ppo_max_token_len_per_gpu", 32768),
    Rule("critic.model.enable_gradient_checkpointing", "critic.gradient_checkpointing", True),
    Rule("critic.cliprange_value", "critic.cliprange_value", 0.5),
    Rule("critic.loss_agg_mode", "critic.loss_agg_mode", From(f"{AR}.actor.loss_agg_mode"), LOSS),
    Rule(
        "critic.loss_scale_factor",
        "critic.loss_scale_factor",
        From(f"{AR}.actor.loss_scale_factor"),
        _off_below_zero,
    ),
    Rule("reward.num_workers", "reward.num_workers", 8),
    Rule(
        f"{AR}.rollout.name",
        "rollout.engine",
        None,
        _words(vllm="vllm", hf="torch", **{"None": "auto"}),
    ),
    Rule(f"{AR}.rollout.n", "rollout.n", 1),
    Rule(f"{AR}.rollout.temperature", "rollout.temperature", 1.0),
    Rule(f"{AR}.rollout.top_k", "rollout.top_k", -1, _off_below_zero),
    Rule(f"{AR}.rollout.top_p", "rollout.top_p", 1),
    Rule(f"{AR}.rollout.max_num_seqs", "rollout.max_num_seqs", 256),
    Rule("data.max_response_length", "rollout.response_length", 512),
    Rule(
        "algorithm.rollout_correction.bypass_mode",
        "rollout.old_log_probs",
        False,
        _words(**{"True": "engine", "False": "recompute"}),
    ),
    Rule("algorithm.adv_estimator", "algorithm.adv_estimator", "gae", ESTIMATORS),
    Rule("algorithm.gamma", "algorithm.gamma", 1.0),
    Rule("algorithm.lam", "algorithm.lam", 1.0),
    Rule("algorithm.use_kl_in_reward", "algorithm.use_kl_in_reward", False),
    Rule("algorithm.kl_penalty", "algorithm.kl_penalty", "kl", KL),
    Rule("algorithm.kl_ctrl.type", "algorithm.kl_ctrl.type", "fixed"),
    Rule("algorithm.kl_ctrl.kl_coef", "algorithm.kl_ctrl.kl_coef", 0.001),
    Rule("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.horizon", 10000),
    Rule("algorithm.kl_ctrl.target_kl", "algorithm.kl_ctrl.target_kl", 0.1),
    Rule("algorithm.norm_adv_by_std_in_grpo", "algorithm.norm_adv_by_std_in_grpo", True),
    Rule(
        "algorithm.rollout_correction.rollout_is",
        "algorithm.tis",
        None,
        _words(**{"None": "off", "token": "on"}),
    ),
    Rule("algorithm.rollout_correction.rollout_is_threshold", "algorithm.tis_cap", 2.0),
    Rule("trainer.critic_warmup", "algorithm.critic_warmup", 0),
    Rule("data.train_files", "data.train_files", "~/data/rlhf/gsm8k/train.parquet", _home),
    Rule("data.prompt_key", "data.prompt_key", "prompt"),
    Rule("data.max_prompt_length", "data.max_prompt_length", 512),
    Rule("data.train_batch_size", "data.train_batch_size", 1024),
    Rule("data.shuffle", "data.shuffle", True),
    Rule(
        "data.truncation",
        "data.overlong_prompts",
        "error",
        _words(error="error", left="truncate_left"),
    ),
    Rule("trainer.total_epochs", "trainer.total_epochs", 30),
    Rule("trainer.total_training_steps", "trainer.total_training_steps", None, _off_below_zero),
    Rule("trainer.project_name", "trainer.project_name", "verl_examples"),
    Rule("trainer.experiment_name", "trainer.experiment_name", "gsm8k"),
    Rule("trainer.logger", "trainer.logger", ["console", "wandb"], _loggers),
    Rule("trainer.save_freq", "trainer.save_freq", -1, _off_below_zero),
    Rule("trainer.test_freq", "trainer.test_freq", -1, _off_below_zero),
    Rule("trainer.val_before_train", "trainer.val_before_train", True),
    Rule("trainer.max_actor_ckpt_to_keep", "trainer.max_checkpoints", None, _off_below_zero),
    Rule("trainer.device", "placement.device", "cuda", _words(cuda="cuda", cpu="cpu")),
)

# Keys that several of ours come from, or that decide how others are read: see `verl.py`.
COMBINED: dict[str, object] = {
    "trainer.nnodes": 1,
    "trainer.n_gpus_per_node": 8,
    "trainer.default_local_dir": "checkpoints/${trainer.project_name}/${trainer.experiment_name}",
    "data.val_files": "~/data/rlhf/gsm8k/test.parquet",
    "data.val_max_samples": -1,
    "data.seed": None,
    "data.filter_overlong_prompts": False,
    f"{AR}.rollout.val_kwargs.n": 1,
    f"{AR}.rollout.val_kwargs.temperature": 0,
    f"{AR}.rollout.val_kwargs.top_k": -1,
    f"{AR}.rollout.val_kwargs.top_p": 1.0,
    f"{AR}.rollout.val_kwargs.do_sample": False,
    "reward.custom_reward_function.path": None,
    "reward.custom_reward_function.name": "compute_score",
    "reward.reward_model.enable": False,
    "reward.reward_model.model_path": None,
}

# Older spellings that verl still reads.
RENAMED: dict[str, str] = {
    "custom_reward_function.path": "reward.custom_reward_function.path",
    "custom_reward_function.name": "reward.custom_reward_function.name",
    "reward_model.enable": "reward.reward_model.enable",
    "reward_model.model.path": "reward.reward_model.model_path",
    "reward_model.num_workers": "reward.num_workers",
    f"{AR}.rollout.response_length": "data.max_response_length",
    f"{AR}.rollout.prompt_length": "data.max_prompt_length",
    f"{AR}.actor.grad_clip": f"{AR}.actor.optim.clip_grad",
    "critic.grad_clip": "critic.optim.clip_grad",
    f"{AR}.actor.optim.warmup_style": f"{AR}.actor.optim.lr_scheduler_type",
    "critic.optim.warmup_style": "critic.optim.lr_scheduler_type",
}

# (key, the values that change nothing, what the key would do). "*" ends a prefix.
_SKIPS = ("rollout", "rollout_tq", "async_rollout")
OFF = (False, None, "", 0, -1)
CHANGES: tuple[tuple[str, tuple[object, ...], str], ...] = (
    (f"{AR}.actor.policy_loss.loss_mode", ("vanilla", None), "another policy loss"),
    (f"{AR}.actor.shuffle", OFF, "shuffled mini-batches"),
    ("critic.shuffle", OFF, "shuffled mini-batches"),
    (f"{AR}.actor.optim.lr_warmup_steps_ratio", OFF, "warm-up as a share: use lr_warmup_steps"),
    ("critic.optim.lr_warmup_steps_ratio", OFF, "warm-up as a share: use lr_warmup_steps"),
    (f"{AR}.actor.optim.num_cycles", (0.5,), "another cosine"),
    ("critic.optim.num_cycles", (0.5,), "another cosine"),
    (f"{AR}.actor.optim.optimizer", ("AdamW", "adamw", "adam"), "another optimizer"),
    ("critic.optim.optimizer", ("AdamW", "adamw", "adam"), "another optimizer"),
    (f"{AR}.actor.optim.override_optimizer_config", (None, {}), "optimizer settings"),
    ("critic.optim.override_optimizer_config", (None, {}), "optimizer settings"),
    (f"{AR}.actor.freeze_vision_tower", OFF, "frozen weights"),
    (f"{AR}.actor.qat.enable", OFF, "quantized training"),
    (f"{AR}.model.lora_rank", OFF, "adapters instead of full training"),
    (f"{AR}.model.lora.rank", OFF, "adapters instead of full training"),
    (f"{AR}.model.lora_adapter_path", OFF, "adapters instead of full training"),
    ("critic.model.lora_rank", OFF, "adapters instead of full training"),
    ("critic.model.lora.rank", OFF, "adapters instead of full training"),
    (f"{AR}.model.override_config*", (None, {}), "a changed model"),
    ("critic.model.override_config*", (None, {}), "a changed model"),
    (f"{AR}.model.external_lib", OFF, "code of its own"),
    (f"{AR}.model.trust_remote_code", OFF, "code of its own"),
    (f"{AR}.model.custom_chat_template", OFF, "another chat template"),
    (f"{AR}.model.tokenizer_path", OFF, "another tokenizer"),
    (f"{AR}.model.mtp.enable", OFF, "multi-token prediction"),
    (f"{AR}.rollout.ignore_eos", OFF, "responses that do not stop"),
    (f"{AR}.rollout.do_sample", (True,), "greedy training samples"),
    (f"{AR}.rollout.multi_turn.enable", OFF, "several turns and tools"),
    (f"{AR}.rollout.agent.default_agent_loop", ("single_turn_agent",), "another agent loop"),
    (f"{AR}.rollout.agent.agent_loop_config_path", OFF, "another agent loop"),
    (f"{AR}.rollout.quantization", OFF, "quantized generation"),
    (f"{AR}.rollout.enable_rollout_routing_replay", OFF, "replayed routing"),
    (f"{AR}.rollout.engine_kwargs*", (None, {}), "engine settings"),
    (f"{AR}.hybrid_engine", (True,), "generation apart from training"),
    ("algorithm.filter_groups.enable", OFF, "dropped groups and refilled batches"),
    ("algorithm.use_pf_ppo", OFF, "reweighted samples"),
    ("algorithm.rollout_correction.rollout_rs", OFF, "rejected samples"),
    ("algorithm.rollout_correction.rollout_is_batch_normalize", OFF, "normalized weights"),
    ("algorithm.rollout_correction.loss_type", ("ppo_clip",), "another policy loss"),
    ("distillation.enabled", OFF, "a teacher's loss"),
    ("data.custom_cls.path", OFF, "another data set class"),
    ("data.train_max_samples", OFF, "a part of the data"),
    ("data.tokenizer", OFF, "another tokenizer"),
    ("data.reward_fn_key", ("data_source",), "another key for the data's source"),
    ("data.apply_chat_template_kwargs*", (None, {}), "chat template settings"),
    ("data.sampler.class_path", OFF, "another order of the data"),
    ("data.gen_batch_size", OFF, "another batch size"),
    ("reward.reward_manager.source", ("register", None), "another reward manager"),
    ("reward.reward_manager.name", ("naive", None), "another reward manager"),
    ("reward.sandbox_fusion.url", OFF, "scores from a sandbox"),
    ("sandbox_fusion.url", OFF, "scores from a sandbox"),
    ("reward_model.reward_manager", ("naive", None), "another reward manager"),
    ("reward_model.reward_loop_class_name", OFF, "another reward manager"),
    ("trainer.v1.trainer_mode", ("sync",), "asynchronous, off-policy training"),
    ("trainer.v1.sampler.custom_sampler.path", OFF, "another sampler"),
    ("trainer.val_only", OFF, "no training: use rlhfuse eval"),
    *((f"skip.{name}.enable", OFF, "recorded samples") for name in _SKIPS),
    ("critic.model.mtp.enable", OFF, "multi-token prediction"),
    ("critic.model.trust_remote_code", OFF, "code of its own"),
    ("data.trust_remote_code", OFF, "code of its own"),
    ("async_training*", (), "asynchronous, off-policy training"),
    ("defaults", (), "Hydra composition is not followed: verl's own defaults are assumed"),
)


def _keys(places: str, names: str) -> list[str]:
    return [f"{place}.{name}" for place in places.split() for name in names.split()]


# Prefixes of keys that say how verl runs, and nothing about what is computed. "*" stands for one
# name of the path.
RUNS_ONLY: tuple[str, ...] = (
    *_keys(
        f"{AR}.actor {AR}.ref",
        "profiler fsdp_config megatron strategy checkpoint ulysses_sequence_parallel_size qat "
        "use_torch_compile entropy_from_logits_with_chunking entropy_from_logits_chunk_size "
        "entropy_checkpointing pad_to_length use_remove_padding use_fused_kernels rollout_n "
        "log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu log_prob_use_dynamic_bsz "
        "log_prob_max_token_len_per_gpu ppo_micro_batch_size ppo_micro_batch_size_per_gpu "
        "use_dynamic_bsz load_weight veomni torchtitan calculate_entropy calculate_sum_pi_squared "
        "use_prefix_grouper data_loader_seed optim.optimizer_impl optim.total_training_steps "
        "optim.zero_indexed_step",
    ),
    *_keys(
        "critic",
        "fsdp megatron veomni torchtitan strategy checkpoint profiler rollout_n enable "
        "ppo_micro_batch_size ppo_micro_batch_size_per_gpu use_dynamic_bsz data_loader_seed "
        "forward_micro_batch_size forward_micro_batch_size_per_gpu load_weight "
        "forward_max_token_len_per_gpu ulysses_sequence_parallel_size optim.optimizer_impl "
        "optim.total_training_steps optim.zero_indexed_step",
    ),
    *_keys(
        f"{AR}.rollout reward.reward_model.rollout",
        "mode nnodes n_gpus_per_node dtype gpu_memory_utilization enforce_eager profiler "
        "cudagraph_capture_sizes free_cache_engine tensor_model_parallel_size data_parallel_size "
        "expert_parallel_size pipeline_model_parallel_size max_num_batched_tokens max_model_len "
        "enable_chunked_prefill enable_prefix_caching logprobs_mode scheduling_policy load_format "
        "layered_summon log_prob_micro_batch_size log_prob_micro_batch_size_per_gpu "
        "log_prob_use_dynamic_bsz log_prob_max_token_len_per_gpu disable_log_stats "
        "over_sample_rate multi_stage_wake_up router_config_path calculate_log_probs "
        "checkpoint_engine trace skip_tokenizer_init prometheus disaggregation agent.num_workers "
        "seed full_determinism moe_load_balance_metrics_interval",
    ),
    *_keys(
        f"{AR}.model critic.model",
        "use_shm enable_activation_offload use_remove_padding use_liger use_fused_kernels "
        "fused_kernel_options tiled_mlp",
    ),
    *_keys(
        "trainer",
        "balance_batch log_val_generations rollout_data_dir validation_data_dir use_v1 "
        "esi_redundant_time ray_wait_register_center_timeout del_local_ckpt_after_load "
        "default_hdfs_dir max_critic_ckpt_to_keep resume_mode",
    ),
    *_keys(
        "data",
        "use_shm dataloader_num_workers filter_overlong_prompts_workers return_raw_input_ids "
        "return_raw_chat return_full_prompt val_batch_size validation_shuffle",
    ),
    *_keys(
        "reward.reward_model",
        "enable_resource_pool n_gpus_per_node nnodes",
    ),
    f"{AR}.nccl_timeout",
    "global_profiler",
    "transfer_queue",
    "ray_kwargs",
    "hydra",
)

# While the first key switches its feature off, what is below the second changes nothing.
DETAILS: tuple[tuple[str, str], ...] = (
    (f"{AR}.actor.policy_loss.loss_mode", f"{AR}.actor.policy_loss"),
    (f"{AR}.actor.policy_loss.loss_mode", f"{AR}.actor.tau_pos"),
    (f"{AR}.actor.policy_loss.loss_mode", f"{AR}.actor.tau_neg"),
    (f"{AR}.rollout.multi_turn.enable", f"{AR}.rollout.multi_turn"),
    (f"{AR}.model.mtp.enable", f"{AR}.model.mtp"),
    ("critic.model.mtp.enable", "critic.model.mtp"),
    (f"{AR}.model.lora.rank", f"{AR}.model.lora"),
    ("critic.model.lora.rank", "critic.model.lora"),
    (f"{AR}.model.lora_rank", f"{AR}.model.lora_alpha"),
    (f"{AR}.model.lora_rank", f"{AR}.model.target_modules"),
    ("critic.model.lora_rank", "critic.model.lora_alpha"),
    ("critic.model.lora_rank", "critic.model.target_modules"),
    ("algorithm.filter_groups.enable", "algorithm.filter_groups"),
    ("algorithm.use_pf_ppo", "algorithm.pf_ppo"),
    ("distillation.enabled", "distillation"),
    ("reward.sandbox_fusion.url", "reward.sandbox_fusion"),
    ("reward.reward_model.enable", "reward.reward_model"),
    ("reward.reward_manager.source", "reward.reward_manager.module"),
    ("trainer.v1.trainer_mode", "trainer.v1"),
    ("skip.rollout.enable", "skip.rollout"),
    ("skip.rollout_tq.enable", "skip.rollout_tq"),
    ("skip.async_rollout.enable", "skip.async_rollout"),
)
