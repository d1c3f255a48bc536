"""Rollout against training: two log-probabilities of the same token by two programs.

`truncated_weights` corrects for the difference, `mismatch_stats` measures it.
"""

from dataclasses import dataclass

from torch import Tensor

from rlhfuse.algorithms.tally import Stats
from rlhfuse.kernels.policy_loss import kl_terms


@dataclass(frozen=True, slots=True)
class TruncatedWeights:
    """Importance weights [T] without gradient, and their metrics."""

    weights: Tensor
    stats: Stats


def truncated_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, *, cap: float
) -> TruncatedWeights:
    """min(pi_train / pi_rollout, cap) per token: truncated importance sampling.

    Ionides, "Truncated importance sampling", 2008; for rollout engines Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training", 2025.
    """
    ratio = (old_logprobs - rollout_logprobs).detach().clamp(-20.0, 20.0).exp()
    weights = ratio.clamp(max=cap)
    count = ratio.new_tensor(float(ratio.numel()))
    means = {
        "rollout_corr/rollout_is_mean": (weights.double().sum(), count),
        "rollout_corr/rollout_is_ratio_fraction_high": ((ratio > cap).sum(), count),
    }
    maxima = {"rollout_corr/rollout_is_max": ratio.double().max()} if ratio.numel() else {}
    return TruncatedWeights(weights, Stats(means, {}, maxima))


def mismatch_stats(rollout_logprobs: Tensor, train_logprobs: Tensor) -> Stats:
    """How far the engine's log-probabilities lie from the recomputed ones, [T] each.

    Mean and maximum of |difference| (of log-probabilities and of probabilities), KL(rollout ||
    train) as k1 and k3, correlation of the probabilities, effective sample size.
    """
    rollout, train = rollout_logprobs.detach().double(), train_logprobs.detach().double()
    count = rollout.new_tensor(float(rollout.numel()))
    gap = (rollout - train).abs()
    x, y = rollout.exp(), train.exp()
    probability_gap = (x - y).abs()
    weight = (train - rollout).clamp(-20.0, 20.0).exp()
    means = {
        "training/rollout_logprobs_diff_mean": (gap.sum(), count),
        "training/rollout_probs_diff_mean": (probability_gap.sum(), count),
        "rollout_corr/kl": (kl_terms(rollout, train, "k1").sum(), count),
        "rollout_corr/k3_kl": (kl_terms(rollout, train, "k3").sum(), count),
    }
    sums = {
        "mismatch/count": count,
        "mismatch/x": x.sum(),
        "mismatch/x_sq": x.square().sum(),
        "mismatch/y": y.sum(),
        "mismatch/y_sq": y.square().sum(),
        "mismatch/xy": (x * y).sum(),
        "mismatch/weight": weight.sum(),
        "mismatch/weight_sq": weight.square().sum(),
    }
    if not rollout.numel():
        return Stats(means, sums, {})
    maxima = {
        "training/rollout_logprobs_diff_max": gap.max(),
        "training/rollout_probs_diff_max": probability_gap.max(),
    }
    return Stats(means, sums, maxima)
