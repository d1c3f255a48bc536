"""Where the log-probabilities of a loss may come from, as far as a `Config` decides it."""

from rlhfuse.batch_sizes import num_optimizer_steps
from rlhfuse.config import Config


def why_old_wait(config: Config) -> str:
    """Why old log-probabilities must be known before the update; empty where its own forward pass
    may give them: they belong to the policy before its first optimizer step."""
    reasons = {
        "a step has several optimizer steps (actor.ppo_mini_batch_size, actor.ppo_epochs), and "
        "all but the first train another policy": num_optimizer_steps(config, config.actor) > 1,
        "rewards, and so all advantages, depend on them (algorithm.use_kl_in_reward)": (
            config.reference_in_rewards
        ),
        "importance weights need them (algorithm.tis)": config.algorithm.tis == "on",
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def why_reference_stays(config: Config) -> str:
    """Why reference log-probabilities are all computed on the rollout workers, before the update;
    empty where those of later mini-batches are computed within it, in the actor's bubbles. That is
    exact where the reference enters the loss alone: no advantage waits for it."""
    actor, devices = config.actor, config.placement.num_devices
    reasons = {
        "there is no reference": not config.uses_reference,
        "actor.backend is megatron": config.actor.backend == "megatron",
        "the critic is fused with the actor": config.uses_critic,
        "rewards, and so all advantages, depend on it (algorithm.use_kl_in_reward)": (
            config.reference_in_rewards
        ),
        "a step has one mini-batch (actor.ppo_mini_batch_size)": (
            config.data.train_batch_size <= actor.ppo_mini_batch_size
        ),
        "the actor's pipeline has one stage, and so no bubbles": (
            (config.placement.actor_pp or devices) == 1
        ),
        "fusion.reference is off": config.fusion.reference == "off",
        "fusion.intra_stage is off": (
            config.fusion.reference == "auto" and config.fusion.intra_stage == "off"
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), "")


def ratios(config: Config) -> str:
    """Which distributions the policy's ratios compare; empty where tokens are drawn from whole
    ones."""
    if not config.truncates:
        penalties = "of the softmax without penalties, though tokens are drawn with them"
        return penalties if config.penalises else ""
    if config.replays:
        return (
            "of what top-k, top-p and min-p keep (4 bytes a kept token; rollout.top_k bounds "
            "them, algorithm.replay_truncation=off turns it off)"
        )
    why = config.why_no_replay or "algorithm.replay_truncation is off"
    return f"of the whole softmax, though tokens are drawn from a part of it: {why}"
