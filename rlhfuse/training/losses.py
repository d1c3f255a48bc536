"""The loss of each role on the last hidden states of a micro-batch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
import torch.distributed as dist

from rlhfuse.algorithms.losses import (
    Loss,
    PolicyInputs,
    PolicyLossSettings,
    linear_policy_loss,
    normalizer,
    policy_loss,
    value_loss,
)
from rlhfuse.config import Config
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.training.batch import (
    ADVANTAGES,
    OLD,
    REFERENCE,
    RETURNS,
    ROLLOUT,
    VALUES,
    WEIGHTS,
    MicroBatch,
)

LossFunction = Callable[[MicroBatch, torch.Tensor], Loss]
"""(micro-batch, last hidden states [num_tokens, H]) -> its share of the mini-batch's loss."""


class LossHead(Protocol):
    """What stands on the last hidden states; see `rlhfuse.models.stage.ModelStage`."""

    def lm_head_weight(self) -> torch.Tensor:
        """[V, H]; of tensor-parallel ranks: this rank's rows."""

    def values(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, H] -> float32 [rows]."""


def actor_loss(
    config: Config,
    stage: LossHead,
    *,
    num_tokens: int,
    num_samples: int,
    tp_group: dist.ProcessGroup | None = None,
) -> LossFunction:
    """PPO's policy loss; the counts are the whole mini-batch's. `tp_group`: of the ranks that
    share the vocabulary.

    Where a rank has the whole vocabulary the loss is fused with the head: the head's gradients
    are formed in the forward pass (three products, not four), and a micro-batch between forward
    and backward holds a gradient of the head's weight in place of logits. Not so with ratios of
    whole responses (`actor.ratio_level`): they take head and loss apart."""
    settings = policy_settings(config)
    divisor = normalizer(settings.aggregation, num_tokens=num_tokens, num_samples=num_samples)

    def loss(batch: MicroBatch, hidden: torch.Tensor) -> Loss:
        inputs = PolicyInputs(
            logprobs=hidden.new_empty(0),
            old_logprobs=batch.columns.get(OLD),
            advantages=batch.columns[ADVANTAGES],
            cu_seqlens=batch.cu_seqlens,
            ref_logprobs=batch.columns[REFERENCE] if config.actor.use_kl_loss else None,
            weights=batch.columns.get(WEIGHTS),
            rollout_logprobs=batch.columns.get(ROLLOUT),
        )
        rows, weight, labels = hidden[batch.rows], stage.lm_head_weight(), batch.labels
        temperature = config.rollout.temperature
        if tp_group is None or tp_group.size() == 1:
            return linear_policy_loss(
                rows, weight, labels, inputs, settings,
                normalizer=divisor, temperature=temperature, entropy=True, kept=batch.kept,
            )  # fmt: skip
        assert batch.kept is None, "kept tokens with a cut vocabulary"
        tokens = linear_logprob(
            rows, weight, labels, temperature=temperature, entropy=True, tp_group=tp_group
        )
        inputs = replace(inputs, logprobs=tokens.logprob, entropy=tokens.entropy)
        return policy_loss(inputs, settings, normalizer=divisor)

    return loss


def critic_loss(
    config: Config, stage: LossHead, *, num_tokens: int, num_samples: int
) -> LossFunction:
    """PPO's value loss; the counts are the whole mini-batch's."""
    aggregation = config.critic.loss_agg_mode
    fixed_length = config.critic.loss_scale_factor or config.rollout.response_length
    divisor = normalizer(aggregation, num_tokens=num_tokens, num_samples=num_samples)

    def loss(batch: MicroBatch, hidden: torch.Tensor) -> Loss:
        return value_loss(
            stage.values(hidden[batch.rows]),
            batch.columns[VALUES],
            batch.columns[RETURNS],
            batch.cu_seqlens,
            clip=config.critic.cliprange_value,
            aggregation=aggregation,
            fixed_length=fixed_length,
            normalizer=divisor,
        )

    return loss


def policy_settings(config: Config) -> PolicyLossSettings:
    """The policy loss that the configuration asks for."""
    actor = config.actor
    return PolicyLossSettings(
        clip_low=actor.clip_ratio if actor.clip_ratio_low is None else actor.clip_ratio_low,
        clip_high=actor.clip_ratio if actor.clip_ratio_high is None else actor.clip_ratio_high,
        ratio_level=actor.ratio_level,
        dual_clip=actor.clip_ratio_c or None,
        aggregation=actor.loss_agg_mode,
        fixed_length=actor.loss_scale_factor or config.rollout.response_length,
        entropy_coef=actor.entropy_coeff,
        kl_coef=actor.kl_loss_coef if actor.use_kl_loss else 0.0,
        kl_estimator=actor.kl_loss_type,
    )
