"""Where complete groups may be trained one by one, some of them before the batch is complete.

Without a critic a group's advantages need its own samples alone. Where a step has one optimizer
step, its forward and backward passes can run on a device that has nothing left to generate. The
batch's normaliser is known at the end: until then losses are divided by a nominal one.
"""

import math
from typing import NamedTuple

from rlhfuse.config import Config


class BatchSize(NamedTuple):
    """Response tokens and samples of a whole batch, over all replicas."""

    tokens: int
    samples: int


def why_never(config: Config) -> str:
    """Why groups are trained together on whatever devices; empty where they need not be."""
    actor, algorithm = config.actor, config.algorithm
    whitened = algorithm.adv_estimator == "reinforce_plus_plus" and algorithm.whiten_advantages
    reasons = {
        "there is a critic: advantages are whitened over the batch, and both models are fused": (
            config.uses_critic
        ),
        "advantages are whitened over the batch (algorithm.whiten_advantages)": whitened,
        "a step has several optimizer steps (actor.ppo_mini_batch_size, actor.ppo_epochs)": (
            config.data.train_batch_size > actor.ppo_mini_batch_size or actor.ppo_epochs > 1
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def why_groups_wait(config: Config) -> str:
    """Why groups are trained together, when the batch is complete; empty where they need not be."""
    actor, place = config.actor, config.placement
    reasons = {
        why_never(config): bool(why_never(config)),
        "actor.backend is megatron": actor.backend == "megatron",
        "one device is no whole replica of the actor (placement.actor_pp must be 1)": (
            (place.actor_pp or place.num_devices) > 1
        ),
        "there is one device: it is free when the batch is complete": place.num_devices == 1,
        "actor.num_microbatches is set, and a group is cut by its tokens alone "
        "(actor.ppo_max_token_len_per_gpu)": bool(actor.num_microbatches),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def trains_groups(config: Config) -> bool:
    """Whether groups are trained one by one; a fact of the configuration, not of any moment."""
    return config.fusion.early_training != "off" and not why_groups_wait(config)


def nominal_size(config: Config) -> BatchSize:
    """What losses are divided by until the batch's own size is known: powers of two, no smaller."""
    samples = 1 << math.ceil(math.log2(config.data.train_batch_size * config.rollout.n))
    tokens = samples << math.ceil(math.log2(config.rollout.response_length))
    return BatchSize(tokens, samples)
