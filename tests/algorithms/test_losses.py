"""Losses: their definition, exact addition over micro-batches, and metrics of any cut."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rlhfuse.algorithms.losses import (
    Aggregation,
    KlEstimator,
    Loss,
    PolicyInputs,
    PolicyLossSettings,
    normalizer,
    policy_loss,
    value_loss,
)
from rlhfuse.algorithms.mismatch import Correction, Level, importance_weights, mismatch_stats
from rlhfuse.algorithms.tally import Tally, merge, named

AGGREGATIONS: list[Aggregation] = [
    "token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm",
]  # fmt: skip
ESTIMATORS: list[KlEstimator] = ["k1", "k2", "k3"]
LENGTHS = [4, 1, 0, 9, 6]
SETTINGS = PolicyLossSettings(entropy_coef=0.01, kl_coef=0.1, dual_clip=1.5, fixed_length=12)


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_inputs(seed: int = 0) -> PolicyInputs:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, sum(LENGTHS), generator=rng)
    return PolicyInputs(
        logprobs=rows[0] * 0.5 - 1,
        old_logprobs=rows[0] * 0.4 - 1,
        advantages=rows[2] * 2,
        cu_seqlens=cumulative(LENGTHS),
        entropy=rows[3].abs(),
        ref_logprobs=rows[4] * 0.3 - 1,
        weights=rows[1].exp().clamp(max=2.0),
    )


def cut(inputs: PolicyInputs, first: int, last: int) -> PolicyInputs:
    """Samples first to last - 1 as a micro-batch of their own."""
    start, end = int(inputs.cu_seqlens[first]), int(inputs.cu_seqlens[last])

    def own(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[start:end]

    return PolicyInputs(
        logprobs=inputs.logprobs[start:end],
        old_logprobs=inputs.old[start:end],
        advantages=inputs.advantages[start:end],
        cu_seqlens=cumulative(LENGTHS[first:last]),
        entropy=own(inputs.entropy),
        ref_logprobs=own(inputs.ref_logprobs),
        weights=own(inputs.weights),
    )


def gradient(inputs: PolicyInputs, norm: float, settings: PolicyLossSettings) -> Tensor:
    leaf = inputs.logprobs.clone().requires_grad_()
    loss = policy_loss(replace(inputs, logprobs=leaf), settings, normalizer=norm).loss
    (grad,) = torch.autograd.grad(loss, leaf)
    return grad


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_micro_batches_add_up_to_the_mini_batch(aggregation: Aggregation) -> None:
    settings = replace(SETTINGS, aggregation=aggregation)
    inputs = make_inputs()
    norm = normalizer(aggregation, num_tokens=sum(LENGTHS), num_samples=len(LENGTHS))
    whole = policy_loss(inputs, settings, normalizer=norm)
    cuts = [(0, 1), (1, 3), (3, 5)]
    parts = [policy_loss(cut(inputs, *ends), settings, normalizer=norm) for ends in cuts]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss)
    # Not only close: a token's gradient has the same bits in whatever micro-batch it lies.
    pieces = [gradient(cut(inputs, *ends), norm, settings) for ends in cuts]
    assert torch.equal(torch.cat(pieces), gradient(inputs, norm, settings))
    merged = named(merge(part.stats.tally() for part in reversed(parts)))
    expected = named(whole.stats.tally())
    assert merged.keys() == expected.keys()
    for name, value in expected.items():
        assert math.isclose(merged[name], value, rel_tol=1e-6, abs_tol=1e-9), name


def plain_policy_loss(
    inputs: PolicyInputs, settings: PolicyLossSettings, lengths: list[int]
) -> float:
    """The loss by loops over samples and tokens, in Python floats."""
    assert inputs.entropy is not None
    assert inputs.ref_logprobs is not None
    assert inputs.weights is not None
    assert settings.dual_clip is not None
    columns = [
        inputs.logprobs, inputs.old, inputs.advantages, inputs.entropy,
        inputs.ref_logprobs, inputs.weights,
    ]  # fmt: skip
    rows = iter(zip(*(column.tolist() for column in columns), strict=True))
    total = 0.0
    for length in lengths:
        own = 0.0
        for _ in range(length):
            new, old, advantage, entropy, ref, weight = next(rows)
            ratio = math.exp(new - old)
            near = min(max(ratio, 1 - settings.clip_low), 1 + settings.clip_high)
            term = max(-advantage * ratio, -advantage * near)
            if advantage < 0:
                term = min(term, -advantage * settings.dual_clip)
            kl = {"k1": new - ref, "k2": (new - ref) ** 2 / 2}.get(
                settings.kl_estimator, math.exp(ref - new) - (ref - new) - 1
            )
            own += term * weight - settings.entropy_coef * entropy + settings.kl_coef * kl
        if settings.aggregation == "seq-mean-token-mean":
            own /= max(length, 1)
        if settings.aggregation == "seq-mean-token-sum-norm":
            own /= settings.fixed_length
        total += own / (sum(lengths) if settings.aggregation == "token-mean" else len(lengths))
    return total


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_policy_loss_equals_its_definition(
    aggregation: Aggregation, estimator: KlEstimator
) -> None:
    settings = replace(
        SETTINGS, aggregation=aggregation, kl_estimator=estimator, clip_low=0.1, clip_high=0.3
    )
    norm = normalizer(aggregation, num_tokens=sum(LENGTHS), num_samples=len(LENGTHS))
    for seed in range(5):
        inputs = make_inputs(seed)
        found = float(policy_loss(inputs, settings, normalizer=norm).loss)
        truth = plain_policy_loss(inputs, settings, LENGTHS)
        assert math.isclose(found, truth, rel_tol=1e-5, abs_tol=1e-6)


def test_the_gradient_stops_where_the_ratio_is_clipped() -> None:
    inputs = PolicyInputs(
        logprobs=torch.tensor([0.5, 0.5, -0.5, -0.5, 3.0]).requires_grad_(),
        old_logprobs=torch.zeros(5),
        advantages=torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0]),
        cu_seqlens=cumulative([5]),
    )
    settings = PolicyLossSettings(dual_clip=3.0)
    loss = policy_loss(inputs, settings, normalizer=1.0)
    (grad,) = torch.autograd.grad(loss.loss, inputs.logprobs)
    # Clipped above with A > 0, clipped below with A < 0, dual-clipped at ratio e^3.
    assert [bool(g) for g in grad] == [False, True, True, False, False]
    metrics = named(loss.stats.tally())
    assert math.isclose(metrics["actor/pg_clipfrac"], 2 / 5)
    assert math.isclose(metrics["actor/pg_clipfrac_lower"], 1 / 5)


def test_k2_gradient_under_any_estimators_value() -> None:
    inputs = replace(make_inputs(), advantages=torch.zeros(sum(LENGTHS)), entropy=None)
    base = PolicyLossSettings(kl_coef=1.0, kl_estimator="k2")
    straight = PolicyLossSettings(kl_coef=1.0, kl_estimator="k3", kl_gradient_k2=True)
    assert torch.allclose(gradient(inputs, 1.0, straight), gradient(inputs, 1.0, base))
    value = policy_loss(inputs, replace(straight, kl_gradient_k2=False), normalizer=1.0).loss
    assert torch.allclose(policy_loss(inputs, straight, normalizer=1.0).loss, value)


def value_case(clip: float | None) -> tuple[Loss, Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    values, old, returns = torch.randn(3, sum(LENGTHS), generator=rng)
    values.requires_grad_()
    loss = value_loss(
        values, old, returns, cumulative(LENGTHS), clip=clip, normalizer=2.0, fixed_length=10,
        aggregation="seq-mean-token-sum-norm",
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss.loss, values)
    return loss, grad, values.detach(), old, returns


def test_value_loss_equals_its_definition() -> None:
    loss, grad, values, old, returns = value_case(0.5)
    near = torch.maximum(torch.minimum(values, old + 0.5), old - 0.5)
    both = torch.stack([(values - returns) ** 2, (near - returns) ** 2])
    assert torch.allclose(loss.loss, 0.5 * both.amax(0).sum() / 20)
    frozen = (both[1] > both[0]) & (near != values)
    assert bool(frozen.any())
    assert not grad[frozen].any()
    assert torch.allclose(grad[~frozen], ((values - returns) / 20)[~frozen])
    metrics = named(loss.stats.tally())
    expected = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    assert math.isclose(metrics["critic/vf_explained_var"], float(expected), rel_tol=1e-5)
    plain, _, _, _, _ = value_case(None)
    assert torch.allclose(plain.loss, 0.5 * both[0].sum() / 20)


def test_an_empty_micro_batch_has_a_loss_of_zero() -> None:
    inputs = cut(make_inputs(), 2, 3)
    loss = policy_loss(inputs, SETTINGS, normalizer=20.0)
    assert float(loss.loss) == 0.0
    whole = policy_loss(make_inputs(), SETTINGS, normalizer=20.0).stats.tally()
    assert merge([whole, Tally({}, {}, {})]) == whole
    empty = inputs.logprobs
    critic = value_loss(empty, empty, empty, inputs.cu_seqlens, clip=0.2, normalizer=20.0)
    assert float(critic.loss) == 0.0


def test_missing_inputs_and_bad_settings_are_named() -> None:
    bare = PolicyInputs(
        logprobs=torch.zeros(2), old_logprobs=torch.zeros(2), advantages=torch.zeros(2),
        cu_seqlens=cumulative([2]),
    )  # fmt: skip
    with pytest.raises(ValueError, match="entrop"):
        policy_loss(bare, PolicyLossSettings(entropy_coef=0.1), normalizer=1.0)
    with pytest.raises(ValueError, match="reference"):
        policy_loss(bare, PolicyLossSettings(kl_coef=0.1), normalizer=1.0)
    with pytest.raises(ValueError, match="clip_ratio_c"):
        PolicyLossSettings(dual_clip=0.5)
    norm = PolicyLossSettings(aggregation="seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="loss_scale_factor"):
        policy_loss(bare, norm, normalizer=1.0)
    with pytest.raises(ValueError, match="no loss"):
        normalizer("token-mean", num_tokens=0, num_samples=3)


def test_importance_weights_and_mismatch() -> None:
    rng = torch.Generator().manual_seed(9)
    rollout = -torch.rand(400, generator=rng) * 3
    same = named(mismatch_stats(rollout, rollout).tally())
    assert same["training/rollout_logprobs_diff_max"] == 0.0
    assert same["rollout_corr/k3_kl"] == 0.0
    assert math.isclose(same["rollout_corr/rollout_is_eff_sample_size"], 1.0)
    assert math.isclose(same["training/rollout_actor_probs_pearson_corr"], 1.0)
    train = rollout + 0.5 * torch.randn(400, generator=rng)
    apart = named(merge([mismatch_stats(rollout[:9], train[:9]).tally(),
                         mismatch_stats(rollout[9:], train[9:]).tally()]))  # fmt: skip
    pair = torch.stack([rollout, train]).double().exp()
    expected = float(torch.corrcoef(pair)[0, 1])
    found = apart["training/rollout_actor_probs_pearson_corr"]
    assert math.isclose(found, expected, rel_tol=1e-6)
    weight = (train - rollout).double().exp()
    share = float(weight.sum() ** 2 / (400 * weight.square().sum()))
    assert math.isclose(apart["rollout_corr/rollout_is_eff_sample_size"], share, rel_tol=1e-6)
    bounds = cumulative([400])
    truncated = importance_weights(train, rollout, bounds, Correction(cap=1.2))
    assert torch.allclose(truncated.weights, weight.float().clamp(max=1.2))
    found_high = named(truncated.stats.tally())["rollout_corr/rollout_is_ratio_fraction_high"]
    assert math.isclose(found_high, float((weight > 1.2).double().mean()))


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
def test_masks_and_levels_of_importance_weights(level: Level) -> None:
    rng = torch.Generator().manual_seed(3)
    lengths = [1, 0, 40, 7, 300]
    rollout = -torch.rand(348, generator=rng)
    train = rollout + 0.1 * torch.randn(348, generator=rng)
    ratios = []
    for own in (train - rollout).double().split(lengths):
        whole = own.sum() if level == "sequence" else own.mean()
        ratios.append((own if level == "token" else whole.expand(len(own))).exp())
    ratio = torch.cat(ratios)
    low, high = ratio.quantile(0.2).item(), ratio.quantile(0.8).item()
    cut = Correction(cap=high, floor=low, level=level)
    mask = Correction(cap=high, floor=low, level=level, rule="mask")
    found = [importance_weights(train, rollout, cumulative(lengths), c) for c in (cut, mask)]
    assert torch.allclose(found[0].weights.double(), ratio.clamp(max=high), rtol=1e-5)
    inside = torch.where((ratio > high) | (ratio < low), 0.0, ratio)
    near = torch.minimum((ratio - low).abs(), (ratio - high).abs()) < 1e-5
    assert torch.allclose(found[1].weights.double()[~near], inside[~near], rtol=1e-5)
    assert bool((inside[~near] == 0).any())


def test_ratios_of_whole_responses_are_gspos() -> None:
    rng = torch.Generator().manual_seed(5)
    lengths = [5, 0, 1, 30, 12]
    old = -torch.rand(48, generator=rng).double()
    leaf = (old + 0.4 * torch.randn(48, generator=rng)).requires_grad_()
    advantage = torch.tensor([1.0, 1.0, -2.0, 0.5, -0.3]).double()
    settings = PolicyLossSettings(
        ratio_level="sequence", aggregation="seq-mean-token-mean", clip_low=0.01, clip_high=0.02,
        dual_clip=None,
    )  # fmt: skip
    inputs = PolicyInputs(
        logprobs=leaf,
        old_logprobs=old,
        advantages=advantage.repeat_interleave(torch.tensor(lengths)),
        cu_seqlens=cumulative(lengths),
    )
    found = policy_loss(inputs, settings, normalizer=5.0).loss
    truth = leaf.new_zeros(())
    for own, given, weight in zip(leaf.split(lengths), old.split(lengths), advantage, strict=True):
        if len(own):
            ratio = (own - given).mean().exp()
            truth = truth + torch.max(-weight * ratio, -weight * ratio.clamp(0.99, 1.02)) / 5
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-7)
    (gradient,) = torch.autograd.grad(found, leaf)
    (true_gradient,) = torch.autograd.grad(truth, leaf)
    torch.testing.assert_close(gradient, true_gradient, rtol=1e-5, atol=1e-8)
    assert bool(true_gradient.any())
