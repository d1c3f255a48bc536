"""Position-keyed draws: the right distribution, the right flags, the same on repetition."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from rlhfuse.engines.base import SamplingParams
from rlhfuse.engines.sampling import (
    NEAR_TIE,
    RowParams,
    _truncate,
    draw,
    forbid_early_stop,
    gumbel,
    penalise,
)

VOCAB = 37
CHOICES = (
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=0.0),
    SamplingParams(top_k=5),
    SamplingParams(top_p=0.6, temperature=0.8),
    SamplingParams(min_p=0.2),
    SamplingParams(top_k=9, top_p=0.7, min_p=0.05, temperature=1.5),
    SamplingParams(top_k=1),
)


def kept_by(params: SamplingParams, logits: torch.Tensor) -> torch.Tensor:
    """What stays, one token at a time: top-k, then top-p, then min-p. Float64 logits [V]."""
    scaled = logits / (params.temperature or 1.0)
    kept = torch.ones(len(logits), dtype=torch.bool)
    if params.top_k:
        kept &= scaled >= scaled.sort(descending=True).values[min(params.top_k, len(logits)) - 1]
    probs = scaled.masked_fill(~kept, -math.inf).softmax(-1)
    if params.top_p < 1:
        kept &= torch.stack([probs[scaled > s].sum() < params.top_p for s in scaled])
    if params.min_p:
        kept &= probs >= params.min_p * probs.max()
    return kept


def rows_of(params: SamplingParams, count: int) -> RowParams:
    return RowParams.of(range(count), [params] * count, vocab_size=VOCAB, device="cpu")


def test_noise_is_splitmix64() -> None:
    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    golden = 0x9E3779B97F4A7C15
    for seed, position in ((0, 0), (2**64 - 1, 17), (2**63, 100_000)):
        key = mix((mix((seed + golden) % 2**64) + (position + 1) * golden) % 2**64)
        bits = [mix((key + (v + 1) * golden) % 2**64) >> 12 for v in range(5)]
        expected = [-math.log(-math.log((b + 0.5) * 2.0**-52)) for b in bits]
        row = RowParams.of([seed], [SamplingParams()], vocab_size=5, device="cpu")
        noise = gumbel(row.seeds, torch.tensor([position]), 5)[0]
        np.testing.assert_allclose(noise.numpy(), expected, rtol=1e-12)


def test_noise_is_gumbel_and_independent() -> None:
    seeds = torch.arange(100).repeat_interleave(100)
    noise = gumbel(seeds, torch.arange(100).repeat(100), 20)
    assert abs(float(noise.mean()) - np.euler_gamma) < 5 * 1.2825 / math.sqrt(noise.numel())
    assert abs(float(noise.var()) - math.pi**2 / 6) < 0.03
    correlation = np.corrcoef(noise.numpy().T) - np.eye(20)
    assert np.abs(correlation).max() < 0.05
    by_position = noise[:, 0].view(100, 100).numpy()
    assert abs(np.corrcoef(by_position[:, :-1].ravel(), by_position[:, 1:].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize("params", CHOICES)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    count = 20_000
    logits = torch.randn(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 2
    kept = kept_by(params, logits)
    scaled = logits / (params.temperature or 1.0)
    expected = scaled.masked_fill(~kept, -math.inf).softmax(-1)
    if params.temperature == 0:
        expected = torch.nn.functional.one_hot(logits.argmax(), VOCAB).double()
    drawn = draw(logits.float().repeat(count, 1), torch.arange(count) * 3, rows_of(params, count))
    seen = torch.bincount(drawn.tokens, minlength=VOCAB) / count
    assert (seen[~kept] == 0).all()
    deviation = (seen - expected).abs() / (expected * (1 - expected) / count + 1e-12).sqrt()
    assert float(deviation[expected > 1e-4].max()) < 4.5
    logprobs = scaled.masked_fill(~kept, -math.inf).log_softmax(-1)
    np.testing.assert_allclose(drawn.logprobs, logprobs[drawn.tokens], atol=1e-5)
    assert float(drawn.near_ties.float().mean()) < 0.02


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**32),
    st.sampled_from([0, 1, 2, 5, VOCAB, 99]),
    st.sampled_from([1e-9, 0.05, 0.5, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.01, 0.4, 1.0]),
    st.sampled_from([0.01, 1.0, 8.0]),
    st.booleans(),
)
def test_truncation_keeps_what_its_definition_keeps(
    seed: int, top_k: int, top_p: float, min_p: float, spread: float, equals: bool
) -> None:
    """Token by token, with equal logits and forbidden tokens among them; what is kept for certain
    is kept, and what is kept is possible."""
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.7)
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, VOCAB, dtype=torch.float64, generator=rng) * spread
    if equals:
        logits[:, ::3] = logits[:, :1]
    logits[0, 5:9] = -math.inf
    rows = rows_of(params, 8)
    certain, kept, possible = _truncate(logits / 0.7, rows, torch.full((8,), 1e-3))
    for row in range(8):
        finite = logits[row].isfinite()
        expected = kept_by(params, logits[row]) & finite
        assert torch.equal(kept[row] & finite, expected)
    assert not (certain & ~kept).any()
    assert not (kept & ~possible).any()


@settings(deadline=None, max_examples=200)
@given(
    st.integers(0, 2**32),
    st.sampled_from(CHOICES),
    st.sampled_from([0.01, 0.3, 3.0]),
    st.floats(0, NEAR_TIE * 0.49),
    st.sampled_from([0.3, 1.0, 2.5]),
)
def test_what_is_not_flagged_cannot_be_turned(
    seed: int, params: SamplingParams, spread: float, noise: float, penalty: float
) -> None:
    """Logits wrong by less than half the bound (so a margin by less than all of it): every draw
    that changes was flagged. Narrow spreads make many near ties at every edge."""
    rng = torch.Generator().manual_seed(seed)
    logits = torch.randn(32, VOCAB, dtype=torch.float64, generator=rng) * spread
    error = (torch.rand(32, VOCAB, dtype=torch.float64, generator=rng) * 2 - 1) * noise
    params = replace(params, repetition_penalty=penalty, frequency_penalty=0.1)
    rows, positions = rows_of(params, 32), torch.arange(32)
    wrong = logits + error
    for row in range(32):
        said = np.arange(row, dtype=np.int32)
        penalise(logits[row], params, said, row // 2)
        penalise(wrong[row], params, said, row // 2)
    first = draw(logits, positions, rows)
    second = draw(wrong, positions, rows, near_tie=0.0)
    turned = first.tokens != second.tokens
    assert not (turned & ~first.near_ties).any()


def test_near_ties_are_flagged_at_every_edge() -> None:
    """Greedy, top-k and top-p each with two tokens too close to call."""
    logits = torch.full((1, VOCAB), -9.0)
    logits[0, 4], logits[0, 20] = 2.0, 2.0 + NEAR_TIE / 2
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1)):
        assert bool(draw(logits, torch.tensor([5]), rows_of(params, 1)).near_ties)
    assert bool(draw(logits, torch.tensor([5]), rows_of(SamplingParams(top_p=0.3), 1)).near_ties)
    logits[0, 20] = 3.0
    for params in (SamplingParams(temperature=0.0), SamplingParams(top_k=1)):
        assert not bool(draw(logits, torch.tensor([5]), rows_of(params, 1)).near_ties)


def test_penalties_are_transformers_and_forbidden_tokens_stay_forbidden() -> None:
    """And those that transformers does not have are once, and once for each time."""
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    logits[30] = -math.inf
    prefix = np.array([3, 4, 4, 30, 7, 7, 7, 4], dtype=np.int32)  # the first four: prompt
    ours = logits.clone()
    penalise(ours, SamplingParams(repetition_penalty=1.7), prefix, 4)
    theirs = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.from_numpy(prefix.astype(np.int64))[None], logits[None].clone()
    )[0]
    assert torch.equal(ours, theirs)
    ours = logits.clone()
    penalise(ours, SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prefix, 4)
    expected = logits.clone()
    expected[7] -= 0.5 + 3 * 0.25
    expected[4] -= 0.5 + 0.25
    torch.testing.assert_close(ours, expected)


def test_stop_tokens_wait_for_min_tokens() -> None:
    logits = torch.zeros(3, VOCAB)
    params = [SamplingParams(min_tokens=4, stop_token_ids=(1, 2))] * 2 + [SamplingParams()]
    forbid_early_stop(logits, params, [3, 4, 0])
    assert logits[0].isinf().nonzero()[:, 0].tolist() == [1, 2]
    assert bool(logits[1:].isfinite().all())
