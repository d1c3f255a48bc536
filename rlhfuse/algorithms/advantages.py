"""From scores to advantages, over packed response tokens.

Shapes: T response tokens of N samples end to end, `cu_seqlens` int32 [N + 1] (an empty response
is allowed and contributes nothing). Nothing here depends on the order of the samples, except
that results come in the same order.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfuse.algorithms.tally import Stats
from rlhfuse.kernels import gae as gae_kernel
from rlhfuse.kernels.packed import check_packed, expand, segment_sum
from rlhfuse.kernels.policy_loss import kl_terms
from rlhfuse.kernels.whiten import whiten_batch


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """Reward of each token [T] (float32), and each sample's sum of KL estimates [N] (float64; None
    where it is not known)."""

    rewards: Tensor
    kl: Tensor | None


@dataclass(frozen=True, slots=True)
class Advantages:
    """What the losses need, [T] each. Without a critic `returns` is the advantages unwhitened."""

    advantages: Tensor
    returns: Tensor


def token_rewards(
    scores: Tensor,
    cu_seqlens: Tensor,
    *,
    logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
) -> TokenRewards:
    """The score [N] at each sample's last token, minus kl_coef times a KL estimate at each token.

    Args:
        logprobs, ref_logprobs: [T], of the behaviour policy and of the reference; both or
            neither. Without them there is no KL term.

    Raises:
        ValueError: `kl_coef` without log-probabilities, shapes that do not fit, an unknown
            estimator.
    """
    num_tokens = int(cu_seqlens[-1])
    if scores.shape != (cu_seqlens.numel() - 1,):
        raise ValueError(
            f"scores must be one per sample ({cu_seqlens.numel() - 1}), not {tuple(scores.shape)}"
        )
    rewards = torch.zeros(num_tokens, dtype=torch.float32, device=scores.device)
    kl = None
    if logprobs is not None and ref_logprobs is not None:
        check_packed(cu_seqlens, logprobs.numel())
        estimate = kl_terms(logprobs.float(), ref_logprobs.float(), kl_estimator)
        rewards -= estimate * kl_coef
        kl = segment_sum(estimate, cu_seqlens)
    elif kl_coef:
        raise ValueError(
            f"a KL penalty in the reward (kl_coef {kl_coef}) needs log-probabilities of policy "
            f"and reference"
        )
    occupied = cu_seqlens.diff() > 0
    rewards[cu_seqlens[1:][occupied].long() - 1] += scores[occupied].float()
    return TokenRewards(rewards, kl)


def sample_returns(rewards: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Each sample's total reward [N]: what grpo and rloo compare where KL is in the reward."""
    return segment_sum(rewards, cu_seqlens).float()


def gae_advantages(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    whiten: bool = True,
) -> Advantages:
    """GAE; returns come from the unwhitened advantages. The whole batch must be here to whiten."""
    estimate = gae_kernel.whitened_gae if whiten else gae_kernel.gae
    found = estimate(rewards, values, cu_seqlens, gamma=gamma, lam=lam)
    return Advantages(found.advantages, found.returns)


def grpo_advantages(
    scores: Tensor,
    groups: Sequence[int],
    cu_seqlens: Tensor,
    *,
    normalize_std: bool = True,
    eps: float = 1e-6,
) -> Advantages:
    """(score - group mean) / (group std + eps) on every token (DeepSeekMath, arXiv 2402.03300).

    `normalize_std` False leaves the division out (Dr. GRPO, arXiv 2503.20783). `groups[i]` names
    the prompt of sample i. A group of one has nothing to compare with: advantage 0.
    """

    def compare(group: list[float]) -> list[float]:
        mean = math.fsum(group) / len(group)
        centred = [score - mean for score in group]
        if not normalize_std or len(group) == 1:
            return centred
        std = math.sqrt(math.fsum(c * c for c in centred) / (len(group) - 1))
        return [c / (std + eps) for c in centred]

    return _outcome(scores, groups, cu_seqlens, compare)


def rloo_advantages(scores: Tensor, groups: Sequence[int], cu_seqlens: Tensor) -> Advantages:
    """score - mean of the other samples of its prompt, on every token (arXiv 2402.14740).

    A group of one has nothing to compare with: advantage 0.
    """

    def compare(group: list[float]) -> list[float]:
        if len(group) == 1:
            return [0.0]
        mean = math.fsum(group) / len(group)
        return [(score - mean) * len(group) / (len(group) - 1) for score in group]

    return _outcome(scores, groups, cu_seqlens, compare)


def reinforce_plus_plus_advantages(
    rewards: Tensor, cu_seqlens: Tensor, *, gamma: float = 1.0, whiten: bool = True
) -> Advantages:
    """Discounted token rewards (KL inside), whitened over the batch (arXiv 2501.03262)."""
    returns = gae_kernel.discounted_returns(rewards, cu_seqlens, gamma=gamma)
    advantages = whiten_batch(returns, cu_seqlens) if whiten else returns
    return Advantages(advantages, returns)


def batch_stats(
    *,
    scores: Tensor,
    token_rewards: TokenRewards,
    advantages: Advantages,
    cu_seqlens: Tensor,
    values: Tensor | None = None,
) -> Stats:
    """The field's critic/* metrics of a batch: scores, rewards, advantages, returns, values, KL."""
    num_tokens = token_rewards.rewards.numel()
    per_token = {
        "critic/advantages": advantages.advantages,
        "critic/returns": advantages.returns,
    } | ({} if values is None else {"critic/values": values})
    per_sample = {
        "critic/score": scores,
        "critic/rewards": segment_sum(token_rewards.rewards, cu_seqlens),
        "response_length": cu_seqlens.diff(),
    }
    means = {}
    maxima = {}
    for name, tensor in (per_token | per_sample).items():
        if tensor.numel():
            wide = tensor.double()
            means[f"{name}/mean"] = (wide.sum(), wide.new_tensor(float(wide.numel())))
            maxima[f"{name}/max"] = wide.max()
    kl = token_rewards.kl
    if kl is not None:
        means["actor/reward_kl_penalty"] = (kl.sum(), kl.new_tensor(float(num_tokens)))
        means["critic/kl"] = (kl.sum(), kl.new_tensor(float(max(kl.numel(), 1))))
    return Stats(means, {}, maxima)


def _outcome(
    scores: Tensor,
    groups: Sequence[int],
    cu_seqlens: Tensor,
    compare: Callable[[list[float]], list[float]],
) -> Advantages:
    """Compare each prompt's scores and spread the result over the samples' tokens.

    Sums are exactly rounded in Python floats: the order of the samples cannot matter.
    """
    numbers = scores.tolist()
    if len(groups) != len(numbers) or cu_seqlens.numel() != len(numbers) + 1:
        raise ValueError(
            f"{len(numbers)} scores, {len(groups)} groups and {cu_seqlens.numel() - 1} sequences: "
            f"there must be one of each per sample"
        )
    members: dict[int, list[int]] = {}
    for index, group in enumerate(groups):
        members.setdefault(group, []).append(index)
    outcome = [0.0] * len(numbers)
    for indices in members.values():
        compared = compare([numbers[i] for i in indices])
        for index, advantage in zip(indices, compared, strict=True):
            outcome[index] = advantage
    per_sample = torch.tensor(outcome, dtype=torch.float32, device=scores.device)
    advantages = expand(per_sample, cu_seqlens, int(cu_seqlens[-1]))
    return Advantages(advantages, advantages)
