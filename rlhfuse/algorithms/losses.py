"""Policy and value losses over packed response tokens.

Shapes: T response tokens of a micro-batch's N samples end to end, `cu_seqlens` int32 [N + 1].
The normaliser is a number known before the forward pass (tokens or samples of the whole
mini-batch, over all data-parallel ranks), so the losses of micro-batches add up to the
mini-batch's loss, and a token's gradient does not depend on how the mini-batch is cut.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rlhfuse.algorithms.mismatch import mismatch_stats
from rlhfuse.algorithms.tally import Stats
from rlhfuse.kernels.linear_logprob import linear_logprob
from rlhfuse.kernels.linear_loss import linear_loss
from rlhfuse.kernels.packed import check_packed, expand, lengths, segment_sum
from rlhfuse.kernels.policy_loss import PolicyTerms, kl_terms, policy_terms, value_terms
from rlhfuse.kernels.reference import KeptTokens

Aggregation = Literal[
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]
KlEstimator = Literal["k1", "k2", "k3"]
RatioLevel = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyLossSettings:
    """How the policy loss is made.

    `ratio_level`: a token's ratio is its own, or its whole response's: the geometric mean of the
    tokens' ratios, clipped as one, with each token's own gradient (GSPO, arXiv 2507.18071).
    `dual_clip` (> 1) bounds the loss where the advantage is negative; None: off.
    `fixed_length`: what seq-mean-token-sum-norm divides a response's sum by, whatever its own
    length (Dr. GRPO, arXiv 2503.20783); the others do not read it.
    `kl_gradient_k2`: the KL loss shows `kl_estimator`'s value but takes k2's gradient, which is
    the KL's own (the gradients of k1 and k3 are not).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    ratio_level: RatioLevel = "token"
    dual_clip: float | None = 3.0
    aggregation: Aggregation = "token-mean"
    fixed_length: int = 0
    entropy_coef: float = 0.0
    kl_coef: float = 0.0
    kl_estimator: KlEstimator = "k3"
    kl_gradient_k2: bool = False

    def __post_init__(self) -> None:
        if self.dual_clip is not None and self.dual_clip <= 1.0:
            raise ValueError(
                f"clip_ratio_c must be greater than 1, not {self.dual_clip} (0 turns it off)"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyInputs:
    """One micro-batch, [T] each. `logprobs` and `entropy` carry gradients.

    `old_logprobs`: None where the policy itself drew the tokens: then they are `logprobs`, without
    a gradient, and `rollout_logprobs`, the engine's (NaN where lost), go into the metrics.
    `weights` correct for the rollout's own log-probabilities (`mismatch.importance_weights`).
    `full_logprobs`: where `logprobs` and `old_logprobs` are those among the tokens that the sampler
    kept, the ones of the whole distribution, whose KL to the reference is taken.
    """

    logprobs: Tensor
    old_logprobs: Tensor | None
    advantages: Tensor
    cu_seqlens: Tensor
    entropy: Tensor | None = None
    ref_logprobs: Tensor | None = None
    weights: Tensor | None = None
    full_logprobs: Tensor | None = None
    rollout_logprobs: Tensor | None = None

    @property
    def old(self) -> Tensor:
        """Log-probabilities of the policy that drew the tokens."""
        return self.logprobs.detach() if self.old_logprobs is None else self.old_logprobs


@dataclass(frozen=True, slots=True)
class Loss:
    """A scalar with its gradient, and the micro-batch's share of the metrics."""

    loss: Tensor
    stats: Stats


def normalizer(aggregation: Aggregation, *, num_tokens: int, num_samples: int) -> float:
    """What to divide by: the whole mini-batch's response tokens, or its samples.

    Raises:
        ValueError: there is nothing to divide by.
    """
    count = num_tokens if aggregation == "token-mean" else num_samples
    if count < 1:
        raise ValueError(f"a mini-batch of {num_tokens} tokens, {num_samples} samples has no loss")
    return float(count)


def token_coefficients(
    cu_seqlens: Tensor,
    aggregation: Aggregation,
    normalizer: float,
    num_tokens: int,
    fixed_length: int = 0,
) -> Tensor:
    """Each token's factor in the loss, float32 [T]: 1/tokens, 1/samples, 1/(samples length) or
    1/(samples fixed_length).

    Each factor is a function of the token's own sample and of the normaliser.

    Raises:
        ValueError: an unknown aggregation, or no fixed length where it needs one.
    """
    if aggregation in ("token-mean", "seq-mean-token-sum"):
        return torch.full((num_tokens,), 1.0 / normalizer, device=cu_seqlens.device)
    if aggregation == "seq-mean-token-sum-norm":
        if fixed_length < 1:
            raise ValueError(
                f"loss_agg_mode {aggregation} divides by a fixed length of at least 1, not "
                f"{fixed_length} (loss_scale_factor)"
            )
        factor = 1.0 / (normalizer * fixed_length)
        return torch.full((num_tokens,), factor, device=cu_seqlens.device)
    if aggregation == "seq-mean-token-mean":
        per_sample = 1.0 / (lengths(cu_seqlens).clamp_min(1).double() * normalizer)
        return expand(per_sample.float(), cu_seqlens, num_tokens)
    raise ValueError(
        f"loss_agg_mode {aggregation!r} is unknown: use token-mean, seq-mean-token-sum, "
        f"seq-mean-token-mean or seq-mean-token-sum-norm"
    )


def policy_loss(inputs: PolicyInputs, settings: PolicyLossSettings, *, normalizer: float) -> Loss:
    """PPO's policy loss with entropy bonus and KL loss, and its actor/* metrics.

    loss = sum_t c_t (pg_t - entropy_coef H_t + kl_coef KL_t), c_t from `token_coefficients`.

    Args:
        normalizer: from `normalizer()` of the whole mini-batch.

    Raises:
        ValueError: an input that the settings need is missing, or shapes do not fit.
    """
    num_tokens = inputs.logprobs.numel()
    check_packed(inputs.cu_seqlens, num_tokens)
    coefficients = token_coefficients(
        inputs.cu_seqlens, settings.aggregation, normalizer, num_tokens, settings.fixed_length
    )
    terms = _token_terms(inputs, settings)
    count = coefficients.new_full((), float(num_tokens))
    share = _share(inputs.cu_seqlens, settings.aggregation, normalizer)
    means = {
        "actor/pg_loss": (_weighted(coefficients, terms.policy.loss), share),
        "actor/pg_clipfrac": (terms.policy.clipped.sum(), count),
        "actor/pg_clipfrac_lower": (terms.policy.clipped_lower.sum(), count),
        "actor/ppo_kl": (_total(inputs.old - inputs.logprobs), count),
        "actor/ratio_mean": (_total(terms.policy.ratio), count),
    }
    if inputs.entropy is not None:
        means["actor/entropy"] = (_total(inputs.entropy), count)
    if terms.kl is not None:
        means["actor/kl_loss"] = (_weighted(coefficients, terms.kl), share)
    maxima = {"actor/ratio_max": terms.policy.ratio.double().max()} if num_tokens else {}
    stats = Stats(means, {}, maxima)
    if inputs.rollout_logprobs is not None:
        known = ~inputs.rollout_logprobs.isnan()
        gap = mismatch_stats(inputs.rollout_logprobs[known], inputs.old[known])
        stats = Stats({**means, **gap.means}, gap.sums, {**maxima, **gap.maxima})
    return Loss((coefficients * terms.loss).sum(), stats)


def linear_policy_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    inputs: PolicyInputs,
    settings: PolicyLossSettings,
    *,
    normalizer: float,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    entropy: bool = False,
    kept: KeptTokens | None = None,
) -> Loss:
    """`policy_loss` of `linear_logprob`, with three matrix products in place of four.

    Same gradients, bit for bit, as the two apart; see `kernels.linear_loss`. Ratios of whole
    responses are not known before the head has run over them: there it is the two apart.

    Args:
        hidden: [T, H]. weight: [V, H]. labels: [T], the response tokens. inputs: its `logprobs`
            and `entropy` are not read (they are computed here) and may be empty.
        entropy: compute the entropies, also where they are a metric only.
        kept: what the sampler kept at each token. Ratios are then of log-probabilities among those
            (as `old_logprobs` must be); entropy and KL are of the whole distribution.
    """
    wanted = entropy or settings.entropy_coef != 0.0
    if settings.ratio_level == "sequence":
        out = linear_logprob(
            hidden, weight, labels, bias=bias, temperature=temperature, entropy=wanted
        )
        full = replace(inputs, logprobs=out.logprob, entropy=out.entropy)
        if kept is not None:
            among = linear_logprob(
                hidden, weight, labels, bias=bias, temperature=temperature, kept=kept
            )
            full = replace(full, logprobs=among.logprob, full_logprobs=out.logprob)
        return policy_loss(full, settings, normalizer=normalizer)
    coefficients = token_coefficients(
        inputs.cu_seqlens, settings.aggregation, normalizer, labels.numel(), settings.fixed_length
    )

    def token_loss(rows: slice, logprobs: Tensor, spread: Tensor, replayed: Tensor) -> Tensor:
        chunk = replace(
            inputs,
            logprobs=replayed,
            full_logprobs=logprobs,
            old_logprobs=None if inputs.old_logprobs is None else inputs.old_logprobs[rows],
            advantages=inputs.advantages[rows],
            entropy=spread if wanted else None,
            ref_logprobs=None if inputs.ref_logprobs is None else inputs.ref_logprobs[rows],
            weights=None if inputs.weights is None else inputs.weights[rows],
            rollout_logprobs=None,
        )
        return (coefficients[rows] * _token_terms(chunk, settings).loss).sum()

    fused = linear_loss(
        hidden, weight, labels, token_loss, bias=bias, temperature=temperature, entropy=wanted,
        kept=kept,
    )  # fmt: skip
    with torch.no_grad():
        seen = replace(
            inputs,
            logprobs=fused.replayed.detach(),
            full_logprobs=fused.logprob.detach(),
            entropy=None if fused.entropy is None else fused.entropy.detach(),
        )
        stats = policy_loss(seen, settings, normalizer=normalizer).stats
    return Loss(fused.loss, stats)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    cu_seqlens: Tensor,
    *,
    clip: float | None,
    aggregation: Aggregation = "token-mean",
    fixed_length: int = 0,
    normalizer: float,
) -> Loss:
    """The critic's loss, 0.5 max((v - R)^2, (clip(v) - R)^2), and its critic/* metrics.

    Args:
        values: [T], with gradient. old_values: [T], when the batch was scored. clip: how far a
            value may move from the old one before its gradient stops; None: off.
    """
    num_tokens = values.numel()
    check_packed(cu_seqlens, num_tokens)
    coefficients = token_coefficients(cu_seqlens, aggregation, normalizer, num_tokens, fixed_length)
    terms = value_terms(values, old_values, returns, clip=clip)
    count = coefficients.new_full((), float(num_tokens))
    means = {
        "critic/vf_loss": (
            _weighted(coefficients, terms.loss),
            _share(cu_seqlens, aggregation, normalizer),
        ),
        "critic/vf_clipfrac": (terms.clipped.sum(), count),
        "critic/vpred_mean": (_total(values), count),
    }
    wide_returns = returns.double()
    error = wide_returns - values.detach().double()
    sums = {
        "vf/count": count,
        "vf/return": wide_returns.sum(),
        "vf/return_sq": wide_returns.square().sum(),
        "vf/error": error.sum(),
        "vf/error_sq": error.square().sum(),
    }
    return Loss((coefficients * terms.loss).sum(), Stats(means, sums, {}))


@dataclass(frozen=True, slots=True)
class _TokenTerms:
    """A token's loss before its coefficient, and the parts that metrics show; [T] each."""

    loss: Tensor
    policy: PolicyTerms
    kl: Tensor | None


def _token_terms(inputs: PolicyInputs, settings: PolicyLossSettings) -> _TokenTerms:
    logprobs, old_logprobs = inputs.logprobs, inputs.old
    if settings.ratio_level == "sequence":
        logprobs, old_logprobs = _response_means(inputs), torch.zeros_like(old_logprobs)
    policy = policy_terms(
        logprobs,
        old_logprobs,
        inputs.advantages,
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        dual_clip=settings.dual_clip,
        weights=inputs.weights,
    )
    loss, kl = policy.loss, None
    if settings.entropy_coef:
        if inputs.entropy is None:
            raise ValueError(f"entropy_coeff {settings.entropy_coef} needs the entropies")
        loss = loss - inputs.entropy * settings.entropy_coef
    if inputs.ref_logprobs is not None:
        own = inputs.logprobs if inputs.full_logprobs is None else inputs.full_logprobs
        kl = _kl(own, inputs.ref_logprobs, settings)
        loss = loss + kl * settings.kl_coef
    elif settings.kl_coef:
        raise ValueError(f"kl_loss_coef {settings.kl_coef} needs the reference log-probabilities")
    return _TokenTerms(loss, policy, kl)


def _response_means(inputs: PolicyInputs) -> Tensor:
    """Each token's response's mean log-ratio, with the gradient of the token's own; [T]."""
    own = inputs.logprobs - inputs.old
    means = segment_sum(own, inputs.cu_seqlens) / lengths(inputs.cu_seqlens).clamp_min(1)
    return own - own.detach() + expand(means.to(own.dtype), inputs.cu_seqlens, own.numel())


def _kl(logprobs: Tensor, ref_logprobs: Tensor, settings: PolicyLossSettings) -> Tensor:
    kl = kl_terms(logprobs, ref_logprobs, settings.kl_estimator)
    if not settings.kl_gradient_k2:
        return kl
    carrier = kl_terms(logprobs, ref_logprobs, "k2")
    return kl.detach() + (carrier - carrier.detach())


def _share(cu_seqlens: Tensor, aggregation: Aggregation, normalizer: float) -> Tensor:
    """This micro-batch's part of its mini-batch: over a mini-batch these add up to 1."""
    if aggregation == "token-mean":
        return cu_seqlens[-1].double() / normalizer
    # Filled on the device: a copy of a number from the host would wait for it.
    samples = float(cu_seqlens.numel() - 1)
    return cu_seqlens.new_full((), samples, dtype=torch.float64) / normalizer


def _weighted(coefficients: Tensor, terms: Tensor) -> Tensor:
    return (coefficients.double() * terms.detach().double()).sum()


def _total(values: Tensor) -> Tensor:
    return values.detach().double().sum()
