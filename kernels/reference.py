"""Plain torch definitions: what every kernel must equal.

Shapes: T packed tokens, V vocabulary, H hidden, N sequences, `cu_seqlens` int32 [N + 1] (see
`packed.py`). Each function computes in float32, or in float64 when it is given float64, and is
written to be read, not to be fast. Gradients are autograd's.
"""

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

IGNORE_INDEX = -100
KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of each label [T], and the entropy of each distribution [T] if asked."""

    logprob: Tensor
    entropy: Tensor | None


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """The tokens that a top-k, top-p or min-p sampler kept at each position, ragged.

    Position t kept ``ids[cu[t] : cu[t + 1]]``. ids: int [K]; cu: int [T + 1].
    """

    ids: Tensor
    cu: Tensor


@dataclass(frozen=True, slots=True)
class Shaping:
    """Rewards made of a score at each sequence's last token and a KL penalty at every token.

    r_t = [t is last] score - coefficient kl_t, by `kl_terms`' `estimator`. scores: [N] (that of an
    empty sequence counts nowhere); logprobs, ref_logprobs: [T].
    """

    scores: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    coefficient: float
    estimator: str = "k1"

    def __post_init__(self) -> None:
        if self.estimator not in KL_ESTIMATORS:
            raise ValueError(f"KL estimator {self.estimator!r} is unknown: use k1, k2 or k3")


@dataclass(frozen=True, slots=True)
class Gae:
    """Advantages, returns, and the rewards that they come from, each [T]."""

    advantages: Tensor
    returns: Tensor
    rewards: Tensor


@dataclass(frozen=True, slots=True)
class PolicyTerms:
    """Per-token policy loss and what happened to it, each [T].

    `clipped`: the clipped branch was taken. `clipped_lower`: the dual clip was taken.
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    clipped_lower: Tensor


@dataclass(frozen=True, slots=True)
class ValueTerms:
    """Per-token value loss, and whether the clipped branch was taken, each [T]."""

    loss: Tensor
    clipped: Tensor


def accumulation_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def token_logprob(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
) -> TokenLogprob:
    """log softmax(logits / temperature)[label], and the entropy of that distribution.

    Args:
        logits: [T, V]; -inf marks a token that cannot occur.
        labels: [T], in [0, V) or `ignore_index`, where logprob and entropy are 0.
        temperature: a number, or one per token [T].
    """
    scaled = logits.to(accumulation_dtype(logits))
    if isinstance(temperature, Tensor):
        scaled = scaled / temperature.to(scaled.dtype)[:, None]
    elif temperature != 1.0:
        scaled = scaled / temperature
    keep = labels != ignore_index
    log_probs = torch.log_softmax(scaled, dim=-1)
    chosen = log_probs.gather(1, torch.where(keep, labels, 0).long()[:, None]).squeeze(1)
    logprob = torch.where(keep, chosen, 0.0)
    if not entropy:
        return TokenLogprob(logprob, None)
    # p * log p -> 0 as p -> 0; the inner where keeps its gradient finite as well.
    finite = torch.where(torch.isneginf(log_probs), 0.0, log_probs)
    spread = -(log_probs.exp() * finite).sum(-1)
    return TokenLogprob(logprob, torch.where(keep, spread, 0.0))


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    ignore_index: int = IGNORE_INDEX,
    kept: KeptTokens | None = None,
) -> TokenLogprob:
    """`token_logprob` of ``hidden @ weight.T + bias``, with logits never below float32.

    Args:
        hidden: [T, H]. weight: [V, H]. bias: [V] or None. kept: the distribution is renormalised
            over these tokens. The rest as `token_logprob`.
    """
    dtype = accumulation_dtype(hidden)
    logits = hidden.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits = logits + bias.to(dtype)
    if kept is not None:
        dropped = torch.ones_like(logits, dtype=torch.bool)
        for t, (start, end) in enumerate(pairwise(kept.cu.tolist())):
            dropped[t, kept.ids[start:end].long()] = False
        logits = logits.masked_fill(dropped, -torch.inf)
    return token_logprob(
        logits, labels, temperature=temperature, entropy=entropy, ignore_index=ignore_index
    )


def reverse_scan(values: Tensor, cu_seqlens: Tensor, decay: float) -> Tensor:
    """y_t = x_t + decay * y_{t+1} inside each sequence, y = 0 beyond its end; [T] -> [T]."""
    scanned = torch.empty_like(values)
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        carry = values.new_zeros(())
        for t in range(end - 1, start - 1, -1):
            carry = values[t] + carry * decay
            scanned[t] = carry
    return scanned


def discounted_returns(rewards: Tensor, cu_seqlens: Tensor, gamma: float) -> Tensor:
    """R_t = r_t + gamma * R_{t+1}, [T]."""
    return reverse_scan(rewards.to(accumulation_dtype(rewards)), cu_seqlens, gamma)


def next_values(values: Tensor, cu_seqlens: Tensor, bootstrap: Tensor | None = None) -> Tensor:
    """V(s_{t+1}) for each token: the next token's value, and after the last one `bootstrap`."""
    following = torch.zeros_like(values)
    following[:-1] = values[1:]
    occupied = cu_seqlens.diff() > 0
    last = cu_seqlens[1:][occupied].long() - 1
    following[last] = 0.0 if bootstrap is None else bootstrap[occupied].to(values.dtype)
    return following


def gae(
    rewards: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> Gae:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16).

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; R_t = A_t + V_t.

    Args:
        rewards, values: [T]. bootstrap: [N], the value after the last token; None means 0
            (the response ended).
    """
    dtype = accumulation_dtype(rewards)
    rewards, values = rewards.to(dtype), values.to(dtype)
    deltas = rewards + next_values(values, cu_seqlens, bootstrap) * gamma - values
    advantages = reverse_scan(deltas, cu_seqlens, gamma * lam)
    return Gae(advantages, advantages + values, rewards)


def gae_padded(
    rewards: Tensor | Shaping,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    bootstrap: Tensor | None = None,
) -> Gae:
    """`gae` of padded rows [B, L]: of what the mask keeps, packed; 0 elsewhere.

    bootstrap: [B]. `Shaping`: scores [B], log-probabilities [B, L].
    """
    kept = mask.bool()
    cu_seqlens = torch.nn.functional.pad(kept.sum(1).cumsum(0), (1, 0))
    if isinstance(rewards, Shaping):
        logprobs, ref_logprobs = rewards.logprobs[kept], rewards.ref_logprobs[kept]
        packed = replace(rewards, logprobs=logprobs, ref_logprobs=ref_logprobs)
        given = shaped_rewards(packed, cu_seqlens)
    else:
        given = rewards[kept]
    out = gae(given, values[kept], cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap)
    found = out.advantages.new_zeros(3, *values.shape)
    for into, part in zip(found, (out.advantages, out.returns, given), strict=True):
        into[kept] = part.to(into.dtype)
    return Gae(*found)


def shaped_rewards(shaping: Shaping, cu_seqlens: Tensor) -> Tensor:
    """The reward of each token [T] (Stiennon et al., arXiv 2009.01325: KL at every token)."""
    dtype = accumulation_dtype(shaping.logprobs)
    logprobs, ref_logprobs = shaping.logprobs.to(dtype), shaping.ref_logprobs.to(dtype)
    rewards = -shaping.coefficient * kl_terms(logprobs, ref_logprobs, shaping.estimator)
    occupied = cu_seqlens.diff() > 0
    rewards[cu_seqlens[1:][occupied].long() - 1] += shaping.scores[occupied].to(dtype)
    return rewards


def mean_and_variance(values: Tensor, mask: Tensor | None = None) -> tuple[int, Tensor, Tensor]:
    """Count, mean and unbiased variance (divisor n - 1) of the kept values, in two passes over
    float64; the latter two carry gradients.

    Raises:
        ValueError: nothing is kept.
    """
    kept = (values if mask is None else values[mask.bool()]).double()
    if kept.numel() == 0:
        raise ValueError("mean and variance of no values: every token is masked out")
    mean = kept.mean()
    variance = (kept - mean).square().sum() / max(kept.numel() - 1, 1)
    return kept.numel(), mean, variance


def whiten(
    values: Tensor, mask: Tensor | None = None, *, shift_mean: bool = True, eps: float = 1e-8
) -> Tensor:
    """(values - mean) / sqrt(variance + eps) over the kept tokens; masked tokens become 0.

    The gradient flows through mean and variance, too.
    """
    _, mean, variance = mean_and_variance(values, mask)
    white = (values - mean) * (variance + eps) ** -0.5
    if not shift_mean:
        white = white + mean
    return white if mask is None else torch.where(mask.bool(), white, 0.0)


def policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyTerms:
    """PPO's clipped surrogate per token (arXiv 1707.06347, eq. 7), to be minimised.

    max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)); where A < 0 at most ``-A dual_clip``
    (Ye et al., arXiv 1912.09729); times `weights` (truncated importance sampling). Asymmetric
    bounds: DAPO, arXiv 2503.14476. The log-ratio is held within +-20 so that the ratio is finite.
    """
    ratio = (logprobs - old_logprobs).clamp(-20.0, 20.0).exp()
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    loss = torch.maximum(plain, bounded)
    clipped = bounded > plain
    clipped_lower = torch.zeros_like(clipped)
    if dual_clip is not None:
        ceiling = -advantages * dual_clip
        clipped_lower = (advantages < 0) & (loss > ceiling)
        loss = torch.where(clipped_lower, ceiling, loss)
    if weights is not None:
        loss = loss * weights
    return PolicyTerms(loss, ratio.detach(), clipped, clipped_lower)


def value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float | None
) -> ValueTerms:
    """0.5 max((v - R)^2, (clip(v, v_old +- clip) - R)^2) per token; no clipping for None."""
    plain = (values - returns).square()
    if clip is None:
        return ValueTerms(0.5 * plain, torch.zeros_like(plain, dtype=torch.bool))
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    bounded = (near - returns).square()
    return ValueTerms(0.5 * torch.maximum(plain, bounded), bounded > plain)


def kl_terms(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
    """KL(policy || reference) per token, from the sampled token (Schulman, "Approximating KL
    divergence", 2020): k1 = l - l_ref, k2 = k1^2 / 2, k3 = exp(-k1) + k1 - 1.

    In k3 the log-ratio is held within +-20 so that the exponential is finite.
    """
    log_ratio = logprobs - ref_logprobs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return 0.5 * log_ratio.square()
    if estimator == "k3":
        near = log_ratio.clamp(-20.0, 20.0)
        return torch.expm1(-near) + near
    raise ValueError(f"KL estimator {estimator!r} is unknown: use k1, k2 or k3")
