"""Rollout against training: two log-probabilities of the same token by two programs.

`importance_weights` corrects for the difference, `mismatch_stats` measures it.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhfuse.algorithms.tally import Stats
from rlhfuse.kernels.packed import expand, lengths, segment_sum
from rlhfuse.kernels.policy_loss import kl_terms

Level = Literal["token", "sequence", "geometric"]
Rule = Literal["truncate", "mask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """How a ratio pi_train / pi_rollout becomes a weight.

    level: whose ratio: the token's; its response's (the product of the tokens'); the geometric
    mean of the response's. rule: ratios above `cap` become `cap`; or those outside `floor` to
    `cap` become 0, and their tokens are left out of the loss.
    """

    cap: float
    level: Level = "token"
    rule: Rule = "truncate"
    floor: float = 0.0


@dataclass(frozen=True, slots=True)
class ImportanceWeights:
    """Importance weights [T] without gradient, and their metrics."""

    weights: Tensor
    stats: Stats


def importance_weights(
    old_logprobs: Tensor, rollout_logprobs: Tensor, cu_seqlens: Tensor, correction: Correction
) -> ImportanceWeights:
    """Truncated (TIS) or masked (MIS) importance sampling, [T] each.

    Ionides, "Truncated importance sampling", 2008; for rollout engines Yao et al., "Your
    efficient RL framework secretly brings you off-policy RL training", 2025; masks of tokens
    (IcePop) and of responses: Ling team, "Every step evolves", arXiv 2510.18855, and Liu et al.,
    "When speed kills stability", 2025. Log-ratios are held within +-20.
    """
    gaps = (old_logprobs - rollout_logprobs).detach()
    if correction.level != "token":
        totals = segment_sum(gaps, cu_seqlens)
        if correction.level == "geometric":
            totals = totals / lengths(cu_seqlens).clamp_min(1)
        gaps = expand(totals.to(gaps.dtype), cu_seqlens, gaps.numel())
    ratio = gaps.clamp(-20.0, 20.0).exp()
    high, low = ratio > correction.cap, ratio < correction.floor
    if correction.rule == "truncate":
        weights, low = ratio.clamp(max=correction.cap), torch.zeros_like(high)
    else:
        weights = torch.where(high | low, 0.0, ratio)
    count = ratio.new_full((), float(ratio.numel()))
    means = {
        "rollout_corr/rollout_is_mean": (weights.double().sum(), count),
        "rollout_corr/rollout_is_ratio_fraction_high": (high.sum(), count),
        "rollout_corr/rollout_is_ratio_fraction_low": (low.sum(), count),
    }
    maxima = {"rollout_corr/rollout_is_max": ratio.double().max()} if ratio.numel() else {}
    return ImportanceWeights(weights, Stats(means, {}, maxima))


def mismatch_stats(rollout_logprobs: Tensor, train_logprobs: Tensor) -> Stats:
    """How far the engine's log-probabilities lie from the recomputed ones, [T] each.

    Mean and maximum of |difference| (of log-probabilities and of probabilities), KL(rollout ||
    train) as k1 and k3, correlation of the probabilities, effective sample size.
    """
    rollout, train = rollout_logprobs.detach().double(), train_logprobs.detach().double()
    count = rollout.new_full((), float(rollout.numel()))
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
