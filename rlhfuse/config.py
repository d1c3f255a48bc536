"""The run configuration: a frozen, typed tree, and nothing else decides what a run does.

Top level: the roles ``actor critic reference reward``, then ``rollout algorithm data trainer
placement fusion plan``. Key names are the field's. An unknown key is an error that names the
nearest known one. Reading files and overrides is in `rlhfuse.config_file`.
"""

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]
NonNegative = Annotated[int, msgspec.Meta(ge=0)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]
NonNegativeFloat = Annotated[float, msgspec.Meta(ge=0)]
Fraction = Annotated[float, msgspec.Meta(ge=0, le=1)]
Switch = Literal["auto", "on", "off"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen group of keys."""


class OptimConfig(Section, frozen=True):
    """AdamW with linear warm-up and a schedule over the run's optimizer steps."""

    lr: NonNegativeFloat = 1e-5
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    clip_grad: NonNegativeFloat = 1.0  # global norm over all stages; 0: off
    lr_warmup_steps: NonNegative = 0
    lr_scheduler: Literal["constant", "linear", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.0


class TrainedModelConfig(Section, frozen=True):
    """What actor and critic share. `path` is a Hugging Face model folder."""

    path: str = ""
    optim: OptimConfig = OptimConfig()
    ppo_mini_batch_size: Positive = 32  # prompts per optimizer step
    ppo_epochs: Positive = 1
    num_microbatches: NonNegative = 0  # per mini-batch; 0: from the token budget
    ppo_max_token_len_per_gpu: Positive = 16384  # token budget of a micro-batch
    use_remove_padding: bool = True  # packed samples; false: padded to the longest (more rows)
    gradient_checkpointing: bool = False  # hold layers' inputs; compute them again in backward
    lora_rank: NonNegative = 0  # 0: train all weights; else adapters of this rank (needs peft)
    lora_alpha: Positive = 16
    # Of what adapters read, while training; by sample and position, whatever the schedule.
    lora_dropout: Annotated[float, msgspec.Meta(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] = ()  # names of linear layers; empty: all of the decoder's


class ActorConfig(TrainedModelConfig, frozen=True):
    """The policy and its loss."""

    # Who trains it and the critic: our own stages, or Megatron-core's models (installed apart).
    backend: Literal["torch", "megatron"] = "torch"
    clip_ratio: PositiveFloat = 0.2
    clip_ratio_low: PositiveFloat | None = None
    clip_ratio_high: PositiveFloat | None = None
    clip_ratio_c: float = 3.0  # dual clip for negative advantages; 0: off
    ratio_level: Literal["token", "sequence"] = "token"  # sequence: GSPO's, for a whole response
    loss_agg_mode: Aggregation = "token-mean"
    loss_scale_factor: NonNegative = 0  # of seq-mean-token-sum-norm; 0: rollout.response_length
    entropy_coeff: NonNegativeFloat = 0.0
    use_kl_loss: bool = False
    kl_loss_coef: NonNegativeFloat = 0.001
    kl_loss_type: Literal["k1", "k2", "k3"] = "k3"


class CriticConfig(TrainedModelConfig, frozen=True):
    """The value model and its loss. `init_seed` starts a new head where `path` has none."""

    cliprange_value: PositiveFloat = 0.5
    loss_agg_mode: Aggregation = "token-mean"
    loss_scale_factor: NonNegative = 0  # of seq-mean-token-sum-norm; 0: rollout.response_length
    init_seed: int = 0


class ReferenceConfig(Section, frozen=True):
    """The frozen reference policy; an empty path means the actor's starting weights."""

    path: str = ""


class RewardFunctionConfig(Section, frozen=True):
    """`compute_score` in a Python file: ``path`` and ``name``."""

    path: str
    name: str = "compute_score"


class RewardConfig(Section, frozen=True):
    """Where scores come from: exactly one of a model folder, a function, a service."""

    path: str = ""
    function: RewardFunctionConfig | None = None
    url: str = ""
    auth_env: str = ""  # environment variable that holds the service's bearer token
    timeout_s: PositiveFloat = 30.0
    retries: NonNegative = 3
    num_workers: Positive = 2
    batch_size: Positive = 16  # samples per request of a service
    max_concurrency: Positive = 8  # requests of a service in flight
    on_error: Literal["fail", "score"] = "fail"
    error_score: float = 0.0  # used with on_error: score
    clip: PositiveFloat | None = None  # clip scores to [-clip, clip]


class VllmConfig(Section, frozen=True):
    """What only the vLLM engine has. `speculative_config` is vLLM's own: exact in distribution."""

    block_size: NonNegative = 0  # tokens per key-value block; 0: 32 on a CPU, else vLLM's choice
    max_num_batched_tokens: NonNegative = 0  # tokens of a step, prefill included; 0: vLLM's choice
    enforce_eager: Switch = "auto"  # no CUDA graphs; auto: on a CPU
    # How migrating samples may take their key-value blocks along: as bytes over our own channel
    # (auto), or read by the receiver through vLLM's NIXL connector (needs the package nixl).
    kv_transfer: Literal["auto", "blocks", "nixl", "off"] = "auto"
    position_keyed: Switch = "auto"  # off: vLLM's own sampler, exact in distribution only
    speculative_config: dict[str, str | int | float | bool] | None = None
    tensor_parallel_size: Positive = 1  # devices of an instance; more are planned, not run yet

    @property
    def moves_cache(self) -> bool:
        """Whether a migrating sample can take its key-value blocks along."""
        speculates = self.speculative_config is not None
        return self.kv_transfer != "off" and not (self.kv_transfer == "auto" and speculates)


class RolloutConfig(Section, frozen=True):
    """Generation."""

    engine: Literal["auto", "torch", "vllm"] = "auto"
    n: Positive = 1  # responses per prompt
    temperature: PositiveFloat = 1.0
    top_k: NonNegative = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    min_p: Fraction = 0.0
    # Of training responses; log-probabilities in losses are those without.
    repetition_penalty: PositiveFloat = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    response_length: Positive = 256
    min_response_length: NonNegative = 0
    stop_token_ids: tuple[int, ...] = ()  # beside the tokenizer's end-of-sequence token
    max_num_seqs: Positive = 64  # running samples per instance
    cache_tokens: NonNegative = 0  # key-value room per instance; 0: max_num_seqs full samples
    # Whether instances give back their keys and values for scoring and training; auto: on GPUs.
    sleep: Switch = "auto"
    score_token_budget: Positive = 2048  # tokens per scoring batch
    # Of the policy that drew the tokens: scored on rollout workers; the engine's own numbers; or,
    # where a step has one optimizer step, those of the update's own forward pass: ratios are 1.
    old_log_probs: Literal["recompute", "engine", "update"] = "recompute"
    exactness: Literal["auto", "token", "distribution"] = "auto"
    vllm: VllmConfig = VllmConfig()


class KlControlConfig(Section, frozen=True):
    type: Literal["fixed", "adaptive"] = "fixed"
    kl_coef: NonNegativeFloat = 0.05
    target_kl: PositiveFloat = 6.0
    horizon: Positive = 10_000


class AlgorithmConfig(Section, frozen=True):
    """How scores become advantages."""

    adv_estimator: Literal["gae", "grpo", "rloo", "reinforce_plus_plus"] = "gae"
    gamma: Fraction = 1.0
    lam: Fraction = 0.95
    use_kl_in_reward: bool = True
    kl_penalty: Literal["k1", "k2", "k3"] = "k1"
    kl_ctrl: KlControlConfig = KlControlConfig()
    whiten_advantages: bool = True
    norm_adv_by_std_in_grpo: bool = True
    critic_warmup: NonNegative = 0  # steps in which only the critic is trained
    tis: Literal["auto", "on", "off"] = "auto"  # truncated importance sampling
    tis_cap: PositiveFloat = 2.0
    tis_level: Literal["token", "sequence", "geometric"] = "token"  # whose ratio is the weight
    tis_rule: Literal["truncate", "mask"] = "truncate"  # above the cap: cut to it, or left out
    tis_floor: NonNegativeFloat = 0.0  # mask: left out below it, too
    # Where rollout.top_k, top_p or min_p cut the distribution that tokens are drawn from: ratios
    # of log-probabilities renormalised over what was kept (auto: where that is possible).
    replay_truncation: Switch = "auto"


class ValidationConfig(Section, frozen=True):
    """One validation set and how it is sampled."""

    name: str
    files: tuple[str, ...]
    n: Positive = 1  # responses per prompt; pass@k for k up to n
    temperature: NonNegativeFloat = 0.0  # 0: greedy
    top_k: NonNegative = 0
    top_p: Annotated[float, msgspec.Meta(gt=0, le=1)] = 1.0
    max_samples: NonNegative = 0  # 0: all
    pass_threshold: float = 0.5  # a response passes when its score is above


class DataConfig(Section, frozen=True):
    train_files: tuple[str, ...] = ()
    prompt_key: str = "prompt"
    answer_key: str = "answer"
    max_prompt_length: Positive = 512
    # Chat messages go through the tokenizer's template and text as it is (auto); text, too, as a
    # user's message (on); messages are an error (off).
    apply_chat_template: Switch = "auto"
    overlong_prompts: Literal["error", "filter", "truncate_left"] = "error"
    train_batch_size: Positive = 64  # prompts per step
    shuffle: bool = True
    validation: tuple[ValidationConfig, ...] = ()


class TrainerConfig(Section, frozen=True):
    project_name: str = "rlhfuse"
    experiment_name: str = "default"
    default_local_dir: str = "runs"
    seed: int = 1
    total_epochs: Positive = 1
    total_training_steps: NonNegative = 0  # 0: by epochs
    save_freq: NonNegative = 0  # steps; 0: only at the end
    async_save: bool = True  # write from a copy in host memory, while training goes on
    max_checkpoints: NonNegative = 2  # kept beside the best; 0: all
    test_freq: NonNegative = 0
    val_before_train: bool = True
    best_metric: str = ""  # a val-core/* metric; empty: the first one
    logger: tuple[Literal["console", "jsonl", "tensorboard", "wandb"], ...] = (
        "console",
        "jsonl",
        "tensorboard",
    )
    report: bool = True
    wait_timeout_s: PositiveFloat = 600.0  # longest that a worker may take over one thing
    heartbeat_timeout_s: PositiveFloat = 30.0  # longest without a sign of life: stopped or hung
    # Times that a worker, or the training workers together, may be started again without a
    # finished step between; 0: never.
    max_restarts: NonNegative = 3
    # Steps between states that the run restarts from by itself, beside checkpoints; 0: as often
    # as costs at most 1 % of the time.
    restart_freq: NonNegative = 0


class PlacementConfig(Section, frozen=True):
    """Devices. Each hosts a rollout worker and a training worker."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_devices: Positive = 2
    pin_cpus: bool = True
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    actor_pp: NonNegative = 0  # pipeline stages; 0: all devices, else the rest are replicas (dp)
    critic_pp: NonNegative = 0
    tp: Positive = 1  # tensor-parallel devices of a training pipeline's stage (backend megatron)
    shard_optimizer: bool = True  # over data-parallel replicas (ZeRO stage 1)
    ray_address: str = ""  # empty: a private local cluster


class FusionConfig(Section, frozen=True):
    """``off`` for both is the serial baseline: same samples, same update."""

    inter_stage: Switch = "auto"
    intra_stage: Switch = "auto"
    # Without a critic: reference log-probabilities of later mini-batches inside the actor's update
    # (the training workers then hold the reference too); auto: as intra_stage, where it is exact.
    reference: Switch = "auto"
    split_weight: bool = False  # schedules with the weight gradient split off
    # Without a critic and with one optimizer step a step: freed devices train complete groups while
    # others still generate; auto: where that is possible. Serial steps then cut micro-batches and
    # sum gradients alike, so that both give the same bits (not those of off).
    early_training: Literal["auto", "on", "off"] = "off"
    migration: Literal["auto", "paper", "off"] = "auto"
    migration_margin: NonNegativeFloat = 0.02  # least predicted gain, as a share of the rest
    audit_every: NonNegative = 0  # run every Nth step serially and log the speed-up


class PlanConfig(Section, frozen=True):
    """What ``rlhfuse plan`` and the dry run predict for; training does not read it."""

    hardware: Literal["auto", "cpu", "a100", "h100", "h200", "b200"] = "auto"
    num_nodes: NonNegative = 0  # 0: as many as hold placement.num_devices
    devices_per_node: Positive = 8
    network_gbps: NonNegativeFloat = 0.0  # per device, one direction; 0: the hardware's usual
    rollout_tp: NonNegative = 0  # devices of one generation instance; 0: searched, as all below
    actor_tp: NonNegative = 0  # tensor-parallel devices of a pipeline stage
    actor_pp: NonNegative = 0  # pipeline stages; all other devices are data-parallel replicas
    critic_tp: NonNegative = 0
    critic_pp: NonNegative = 0
    # Lengths: recorded ones, or a lognormal distribution cut off at the response limit.
    lengths_file: str = ""  # JSONL or CSV with response_length, or one number a line
    response_median: NonNegative = 0  # tokens; 0: a sixth of the limit
    response_sigma: PositiveFloat = 0.8  # of log length; 0.75: 99.9th percentile 10 x the median
    prompt_mean: NonNegative = 0  # tokens; 0: half of data.max_prompt_length


class Config(Section, frozen=True):
    """One run."""

    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    reference: ReferenceConfig = ReferenceConfig()
    reward: RewardConfig = RewardConfig()
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    data: DataConfig = DataConfig()
    trainer: TrainerConfig = TrainerConfig()
    placement: PlacementConfig = PlacementConfig()
    fusion: FusionConfig = FusionConfig()
    plan: PlanConfig = PlanConfig()

    @property
    def uses_critic(self) -> bool:
        return self.algorithm.adv_estimator == "gae"

    @property
    def uses_reference(self) -> bool:
        """Whether reference log-probabilities enter the rewards or the loss."""
        return self.reference_in_rewards or self.actor.use_kl_loss

    @property
    def reference_in_rewards(self) -> bool:
        """Whether advantages depend on reference log-probabilities."""
        return self.algorithm.use_kl_in_reward and self.algorithm.adv_estimator != "grpo"

    @property
    def why_no_replay(self) -> str:
        """Why log-probabilities cannot be renormalised over what the sampler keeps, or nothing."""
        if self.rollout.old_log_probs != "recompute":
            given = self.rollout.old_log_probs
            return (
                f"rollout.old_log_probs: {given} knows no kept tokens, recompute finds them again"
            )
        if self.placement.tp > 1:
            return f"placement.tp: {self.placement.tp} cuts the vocabulary"
        return "penalties reshape what is kept" if self.penalises else ""

    @property
    def truncates(self) -> bool:
        """Whether responses are drawn from less than the whole distribution."""
        rollout = self.rollout
        return rollout.top_k > 0 or rollout.top_p < 1 or rollout.min_p > 0

    @property
    def penalises(self) -> bool:
        """Whether a token's chances depend on which tokens came before it."""
        rollout = self.rollout
        penalties = (rollout.presence_penalty, rollout.frequency_penalty)
        return rollout.repetition_penalty != 1 or any(penalties)

    @property
    def replays(self) -> bool:
        """Whether ratios are of log-probabilities among what the sampler kept."""
        wanted = self.algorithm.replay_truncation != "off"
        return wanted and self.truncates and not self.why_no_replay

    @property
    def scored_roles(self) -> tuple[str, ...]:
        """Roles whose inference runs on rollout workers, in the order of their usual cost."""
        roles = {
            "actor": self.rollout.old_log_probs == "recompute",
            "critic": self.uses_critic,
            "reference": self.uses_reference,
            "reward": bool(self.reward.path),
        }
        return tuple(role for role, used in roles.items() if used)
