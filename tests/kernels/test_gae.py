"""Packed GAE, discounted returns and moments against the definitions."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhfuse.kernels import reference
from rlhfuse.kernels.gae import (
    blocked_reverse_scan,
    discounted_returns,
    gae,
    gae_op,
    returns_op,
    whitened_gae,
)
from rlhfuse.kernels.packed import segment_sum
from rlhfuse.kernels.whiten import (
    batch_moments,
    pool,
    sequence_moments,
    whiten_batch,
    whiten_masked,
    whiten_op,
)
from tests.kernels.against_float64 import relative

pytestmark = pytest.mark.usefixtures("poisoned")
SHORT = ("test_schema", "test_faketensor")  # the others trace graphs, which a test here does too


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def batch(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=rng)
    return rewards, values, cumulative(lengths)


LENGTHS = st.lists(st.sampled_from([0, 1, 2, 63, 64, 65, 128, 130, 300]), min_size=0, max_size=6)


@settings(max_examples=20, deadline=None)
@given(LENGTHS, st.sampled_from([(1.0, 1.0), (0.99, 0.95), (0.5, 0.0)]), st.booleans())
def test_gae_equals_the_recurrence(
    lengths: list[int], factors: tuple[float, float], with_bootstrap: bool
) -> None:
    gamma, lam = factors
    rewards, values, cu_seqlens = batch(lengths, seed=sum(lengths))
    bootstrap = torch.randn(len(lengths)) if with_bootstrap else None
    found = gae(rewards, values, cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap)
    truth = reference.gae(
        rewards.double(), values.double(), cu_seqlens, gamma=gamma, lam=lam, bootstrap=bootstrap
    )
    assert relative(found.advantages, truth.advantages) < 1e-6
    assert relative(found.returns, truth.returns) < 1e-6
    returns = discounted_returns(rewards, cu_seqlens, gamma=gamma)
    assert (
        relative(returns, reference.discounted_returns(rewards.double(), cu_seqlens, gamma)) < 1e-6
    )


def test_many_sequences_and_numbers_that_are_narrow_and_lie_apart() -> None:
    rewards, values, cu_seqlens = batch([1] * 70_000, seed=3)
    found = gae(rewards, values, cu_seqlens, gamma=0.9, lam=0.9)
    assert torch.equal(found.advantages, (rewards.double() - values.double()).float())
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rewards, values, cu_seqlens = batch([2 * 40, 0, 2 * 90, 2], seed=4)
        narrow, other = rewards.to(dtype)[::2], values.to(dtype)[::2]
        found = gae(narrow, other, cu_seqlens // 2, gamma=0.97, lam=0.9)
        truth = reference.gae(narrow.double(), other.double(), cu_seqlens // 2, gamma=0.97, lam=0.9)
        assert found.advantages.dtype == torch.float32
        assert relative(found.advantages, truth.advantages) < 1e-6
        assert relative(found.returns, truth.returns) < 1e-6


@pytest.mark.parametrize("lengths", [[], [0], [64], [1, 0, 300, 65], [5000]])
def test_the_scan_of_devices_without_a_compiler_equals_the_compiled_one(lengths: list[int]) -> None:
    rewards, _, cu_seqlens = batch(lengths, seed=7)
    found = blocked_reverse_scan(rewards, cu_seqlens, 0.99)
    assert relative(found, discounted_returns(rewards, cu_seqlens, gamma=0.99).double()) < 1e-6


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 400), min_size=2, max_size=8), st.integers(0, 7))
def test_a_sequences_gae_does_not_depend_on_its_company(lengths: list[int], which: int) -> None:
    which %= len(lengths)
    rewards, values, cu_seqlens = batch(lengths, seed=len(lengths))
    own = slice(int(cu_seqlens[which]), int(cu_seqlens[which + 1]))
    together = gae(rewards, values, cu_seqlens, gamma=0.99, lam=0.95)
    alone = gae(rewards[own], values[own], cumulative([lengths[which]]), gamma=0.99, lam=0.95)
    assert torch.equal(together.advantages[own], alone.advantages)
    assert torch.equal(together.returns[own], alone.returns)


def test_shaped_rewards_whitening_and_a_compiled_graph_change_nothing() -> None:
    scores, _, _ = batch([4], seed=9)
    logprobs, values, cu_seqlens = batch([30, 0, 1, 200], seed=10)
    shaping = reference.Shaping(scores, logprobs, logprobs + 0.1 * values, 0.3, "k3")
    rewards = reference.shaped_rewards(shaping, cu_seqlens)
    apart = gae(rewards, values, cu_seqlens, gamma=0.99, lam=0.95)
    found = whitened_gae(shaping, values, cu_seqlens, gamma=0.99, lam=0.95)
    assert torch.equal(found.rewards, rewards)
    assert torch.equal(found.returns, apart.returns)
    assert torch.equal(found.advantages, whiten_batch(apart.advantages, cu_seqlens))

    mask = rewards > 0

    def graph(rewards: Tensor, values: Tensor) -> Tensor:
        shaping = reference.Shaping(scores, rewards, logprobs, 0.3, "k3")
        out = whitened_gae(shaping, values, cu_seqlens, gamma=0.99, lam=0.95)
        plain = gae(rewards * 2, values, cu_seqlens, gamma=0.99, lam=0.95)
        total = out.advantages + discounted_returns(plain.returns, cu_seqlens, gamma=0.9)
        return total + whiten_masked(plain.advantages, mask) + whiten_batch(total, cu_seqlens)

    compiled = torch.compile(graph, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(rewards, values), graph(rewards, values))
    made_of = (logprobs, rewards, scores, 0.3, "k2")
    for source, whitened in ((made_of, True), ((rewards, None, None, 0.0, "k1"), False)):
        arguments = (*source, values, cu_seqlens, scores, 0.99, 0.95, whitened)
        torch.library.opcheck(gae_op, arguments, test_utils=SHORT)
    torch.library.opcheck(returns_op, (rewards, cu_seqlens, 0.99))
    for bounds, kept in ((cu_seqlens, None), (None, mask)):
        arguments = (rewards, bounds, kept, False, 1e-8)
        torch.library.opcheck(whiten_op, arguments, test_utils=SHORT)
    with pytest.raises(ValueError, match="estimator"):
        reference.Shaping(scores, logprobs, logprobs, 0.3, "k4")
    short = reference.Shaping(scores[:2], logprobs, logprobs, 0.3)
    with pytest.raises(ValueError, match="scores"):
        gae(short, values, cu_seqlens, gamma=1.0, lam=1.0)


def test_whitening_what_a_mask_keeps() -> None:
    rng = torch.Generator().manual_seed(4)
    values, mask = torch.randn(6, 50, generator=rng) + 3, torch.rand(6, 50, generator=rng) < 0.5
    for shift_mean in (True, False):
        found = whiten_masked(values, mask, shift_mean=shift_mean)
        assert (
            relative(found, reference.whiten(values.double(), mask, shift_mean=shift_mean)) < 1e-6
        )
        assert not found[~mask].any()
    assert not whiten_masked(values, torch.zeros_like(mask)).any()


def test_the_inputs_are_left_alone() -> None:
    # One block: its transpose is contiguous already, and must still be copied.
    rewards, values, cu_seqlens = batch([64], seed=8)
    before = rewards.clone(), values.clone()
    gae(rewards, values, cu_seqlens, gamma=1.0, lam=1.0)
    discounted_returns(rewards, cu_seqlens, gamma=1.0)
    assert torch.equal(rewards, before[0])
    assert torch.equal(values, before[1])


def test_a_long_sequence_without_discount_stays_accurate() -> None:
    rewards, values, cu_seqlens = batch([131_072], seed=1)
    found = gae(rewards, values, cu_seqlens, gamma=1.0, lam=1.0)
    wide = rewards.double()
    # With gamma = lam = 1 the return is the plain sum of what is still to come.
    assert relative(found.returns, wide.flip(0).cumsum(0).flip(0)) < 1e-6


def test_moments_pool_to_the_same_bits_in_any_order_and_cut() -> None:
    lengths = [3, 0, 70, 1, 500, 64]
    values, _, cu_seqlens = batch(lengths, seed=2)
    values = values * 0.5 + 50  # a one-pass float32 variance is already wrong here
    parts = sequence_moments(values, cu_seqlens)
    whole = pool(parts)
    count, *numbers = reference.mean_and_variance(values)
    mean, variance = (float(number) for number in numbers)
    assert whole.count == count
    assert math.isclose(whole.mean, mean, rel_tol=1e-12)
    assert math.isclose(whole.variance, variance, rel_tol=1e-9)
    here = batch_moments(values, cu_seqlens)
    assert math.isclose(here.mean, mean, rel_tol=1e-12)
    assert math.isclose(here.variance, variance, rel_tol=1e-9)
    for seed in range(5):
        shuffled = parts.copy()
        random.Random(seed).shuffle(shuffled)
        assert pool(shuffled) == whole
    singles = [
        moment
        for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)
        for moment in sequence_moments(values[start:end], cumulative([end - start]))
    ]
    assert pool(singles) == whole


@pytest.mark.parametrize(("mean", "dtype"), [(0.3, torch.float32), (3e6, torch.float64)])
def test_a_batchs_moments_have_the_same_bits_in_any_order(mean: float, dtype: torch.dtype) -> None:
    # 3e6: squares cancel 40 bits, so a second pass runs. 40,000: longer than what is cached.
    rng = torch.Generator().manual_seed(6)
    parts = [torch.randn(n, generator=rng, dtype=dtype) + mean for n in (3, 0, 40_000, 1, 700, 900)]
    whole = torch.cat(parts).double()
    found = batch_moments(torch.cat(parts), cumulative([len(part) for part in parts]))
    assert math.isclose(found.mean, float(whole.mean()), rel_tol=1e-12)
    assert math.isclose(found.variance, float(whole.var()), rel_tol=1e-10)
    for seed in range(3):
        shuffled = parts.copy()
        random.Random(seed).shuffle(shuffled)
        cu_seqlens = cumulative([len(part) for part in shuffled])
        assert batch_moments(torch.cat(shuffled), cu_seqlens) == found


def test_whitening_equals_the_definition() -> None:
    values, _, cu_seqlens = batch([5, 0, 90], seed=3)
    for shift_mean in (True, False):
        found = whiten_batch(values, cu_seqlens, shift_mean=shift_mean)
        truth = reference.whiten(values.double(), shift_mean=shift_mean)
        assert relative(found, truth) < 1e-6
    assert whiten_batch(values[:0], cumulative([0, 0])).numel() == 0


def test_segment_sum_of_empty_sequences_is_zero() -> None:
    assert segment_sum(torch.ones(3), cumulative([0, 2, 0, 1, 0])).tolist() == [0, 2, 0, 1, 0]
    assert segment_sum(torch.ones(0), cumulative([0, 0])).tolist() == [0, 0]


def test_bad_cumulative_lengths_are_named() -> None:
    rewards = torch.zeros(4)
    for wrong in ([0, 3], [1, 4], [0, 5, 4]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            gae(rewards, rewards, torch.tensor(wrong), gamma=1.0, lam=1.0)
    with pytest.raises(ValueError, match="rewards and values"):
        gae(rewards, rewards[:3], torch.tensor([0, 4]), gamma=1.0, lam=1.0)
