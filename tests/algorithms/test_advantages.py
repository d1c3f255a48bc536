"""Rewards and advantages: definitions by hand, independence of the order of the samples."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhfuse.algorithms.advantages import (
    batch_stats,
    gae_advantages,
    grpo_advantages,
    reinforce_plus_plus_advantages,
    rloo_advantages,
    sample_returns,
    token_rewards,
)
from rlhfuse.algorithms.kl import KlControl, next_control
from rlhfuse.algorithms.tally import named

LENGTHS = [2, 0, 3]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_the_score_sits_on_the_last_token_and_kl_on_every_one() -> None:
    logprobs, reference = torch.tensor([[-1.0, -2, -3, -4, -5], [-1.5, -2, -2, -4, -6]])
    found = token_rewards(
        torch.tensor([1.0, 9.0, -1.0]),
        cumulative(LENGTHS),
        logprobs=logprobs,
        ref_logprobs=reference,
        kl_coef=0.1,
    )
    assert torch.allclose(found.rewards, torch.tensor([-0.05, 1.0, 0.1, 0.0, -1.1]))
    assert found.kl is not None
    assert found.kl.tolist() == [0.5, 0.0, 0.0]
    assert torch.allclose(sample_returns(found.rewards, cumulative(LENGTHS))[0], torch.tensor(0.95))
    plain = token_rewards(torch.tensor([1.0, 9.0, -1.0]), cumulative(LENGTHS))
    assert plain.rewards.tolist() == [0, 1, 0, 0, -1]


def test_grpo_and_rloo_by_hand() -> None:
    scores = torch.tensor([1.0, 0.0, 5.0, 2.0])
    groups = [7, 7, 3, 7]
    cu_seqlens = cumulative([1, 2, 1, 1])
    std = 1.0  # of 1, 0, 2
    grpo = grpo_advantages(scores, groups, cu_seqlens, eps=0.0).advantages
    assert grpo.tolist() == [0.0, -1 / std, -1 / std, 0.0, 1 / std]
    dr_grpo = grpo_advantages(scores * 3, groups, cu_seqlens, normalize_std=False).advantages
    assert dr_grpo.tolist() == [0.0, -3.0, -3.0, 0.0, 3.0]
    rloo = rloo_advantages(scores, groups, cu_seqlens).advantages
    assert rloo.tolist() == [0.0, -1.5, -1.5, 0.0, 1.5]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=12), st.randoms())
def test_group_advantages_do_not_depend_on_the_order(scores: list[float], rng: object) -> None:
    groups = [i % 3 for i in range(len(scores))]
    order = list(range(len(scores)))
    shuffle = getattr(rng, "shuffle")  # noqa: B009  hypothesis types it as Random
    shuffle(order)
    cu_seqlens = cumulative([1] * len(scores))
    for function in (grpo_advantages, rloo_advantages):
        straight = function(torch.tensor(scores), groups, cu_seqlens).advantages
        mixed = function(
            torch.tensor([scores[i] for i in order]), [groups[i] for i in order], cu_seqlens
        ).advantages
        assert torch.equal(mixed, straight[torch.tensor(order)])


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(5)))
def test_whitened_advantages_do_not_depend_on_the_order(order: list[int]) -> None:
    lengths = [3, 70, 1, 0, 20]
    rng = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, sum(lengths), generator=rng)
    cu_seqlens = cumulative(lengths)
    tokens = torch.cat([torch.arange(int(cu_seqlens[i]), int(cu_seqlens[i + 1])) for i in order])
    mixed_cu = cumulative([lengths[i] for i in order])
    straight = gae_advantages(rewards, values, cu_seqlens, gamma=1.0, lam=0.95)
    mixed = gae_advantages(rewards[tokens], values[tokens], mixed_cu, gamma=1.0, lam=0.95)
    assert torch.equal(mixed.advantages, straight.advantages[tokens])
    assert torch.equal(mixed.returns, straight.returns[tokens])
    first = reinforce_plus_plus_advantages(rewards, cu_seqlens).advantages
    second = reinforce_plus_plus_advantages(rewards[tokens], mixed_cu).advantages
    assert torch.equal(second, first[tokens])


def test_whitening_leaves_the_returns_alone() -> None:
    rewards, values = torch.randn(2, 50, generator=torch.Generator().manual_seed(1))
    cu_seqlens = cumulative([20, 30])
    white = gae_advantages(rewards, values, cu_seqlens, gamma=0.9, lam=0.8)
    plain = gae_advantages(rewards, values, cu_seqlens, gamma=0.9, lam=0.8, whiten=False)
    assert torch.equal(white.returns, plain.returns)
    assert torch.allclose(plain.returns, plain.advantages + values)
    assert abs(float(white.advantages.mean())) < 1e-6
    assert math.isclose(float(white.advantages.std()), 1.0, rel_tol=1e-5)


def test_batch_metrics() -> None:
    cu_seqlens = cumulative(LENGTHS)
    scores = torch.tensor([1.0, 2.0, 6.0])
    rewards = token_rewards(scores, cu_seqlens)
    advantages = grpo_advantages(scores, [0, 0, 0], cu_seqlens)
    stats = batch_stats(
        scores=scores, token_rewards=rewards, advantages=advantages, cu_seqlens=cu_seqlens
    )
    metrics = named(stats.tally())
    assert metrics["critic/score/mean"] == 3.0
    assert metrics["critic/score/max"] == 6.0
    assert math.isclose(metrics["response_length/mean"], 5 / 3)
    assert "critic/kl" not in metrics  # there was no reference


def test_kl_coefficient_moves_towards_its_target() -> None:
    control = KlControl(coef=0.1, target=1.0, horizon=100)
    assert math.isclose(next_control(control, kl=5.0, num_samples=50).coef, 0.11)
    assert math.isclose(next_control(control, kl=0.0, num_samples=50).coef, 0.09)
    assert math.isclose(next_control(control, kl=1.1, num_samples=100).coef, 0.11)
    fixed = KlControl(coef=0.1)
    assert next_control(fixed, kl=50.0, num_samples=50) == fixed


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="needs log-probabilities"):
        token_rewards(torch.ones(3), cumulative(LENGTHS), kl_coef=0.1)
    with pytest.raises(ValueError, match="one per sample"):
        token_rewards(torch.ones(2), cumulative(LENGTHS))
    with pytest.raises(ValueError, match="k1, k2 or k3"):
        token_rewards(
            torch.ones(3), cumulative(LENGTHS), logprobs=torch.ones(5), ref_logprobs=torch.ones(5),
            kl_coef=0.1, kl_estimator="k9",
        )  # fmt: skip
    with pytest.raises(ValueError, match="one of each per sample"):
        rloo_advantages(torch.ones(3), [0, 0], cumulative(LENGTHS))
