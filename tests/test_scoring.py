"""Scores are those of a plain forward pass, and the same bits in whatever company."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from rlhfuse import scoring
from rlhfuse.engines.base import Request, SamplingParams
from rlhfuse.engines.torch_engine import TorchEngine
from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head, ModelStage
from rlhfuse.scoring import (
    Floats,
    Kept,
    Tokens,
    batches_by_budget,
    replayed_logprobs,
    rewards,
    token_logprobs,
    values,
)
from tests.models.tiny import save_tiny

Score = Callable[[list[Tokens], int], list[Floats]]


def samples_of(count: int) -> list[Tokens]:
    rng = np.random.default_rng(2)
    return [
        Tokens(
            rng.integers(1, 211, rng.integers(1, 20), dtype=np.int32),
            rng.integers(1, 211, rng.integers(1, 60), dtype=np.int32),
        )
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, ModelStage]:
    path: Path = tmp_path_factory.mktemp("language")
    return save_tiny(path, "qwen3"), load_model(path, head=Head.LM)


@pytest.fixture(scope="module")
def scalar(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, ModelStage]:
    path: Path = tmp_path_factory.mktemp("scalar")
    return save_tiny(path, "llama", head=Head.SCALAR), load_model(path, head=Head.SCALAR)


def test_logprobs_equal_a_plain_forward(language: tuple[PreTrainedModel, ModelStage]) -> None:
    model, stage = language
    samples = samples_of(6)
    scored = token_logprobs(stage, samples, temperature=0.7, token_budget=100)
    for sample, logprobs in zip(samples, scored, strict=True):
        ids = torch.from_numpy(np.concatenate(sample).astype(np.int64))
        with torch.no_grad():
            plain = torch.log_softmax(model(ids[None]).logits[0].double() / 0.7, -1)
        start = len(sample.prompt)
        expected = plain[start - 1 : -1].gather(1, ids[start:, None])[:, 0]
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, expected, atol=2e-5)


def test_values_and_rewards_equal_a_plain_forward(
    scalar: tuple[PreTrainedModel, ModelStage],
) -> None:
    model, stage = scalar
    samples = samples_of(6)
    scored = values(stage, samples, token_budget=100)
    scores = rewards(stage, samples, token_budget=100)
    for sample, value, score in zip(samples, scored, scores, strict=True):
        ids = torch.from_numpy(np.concatenate(sample).astype(np.int64))
        with torch.no_grad():
            states = [model(ids[None, :n]).logits[0, 0] for n in range(1, len(ids) + 1)]
        expected = torch.stack(states)
        np.testing.assert_allclose(value, expected[len(sample.prompt) - 1 : -1], atol=2e-5)
        assert score == pytest.approx(float(expected[-1]), abs=2e-5)


@pytest.mark.parametrize("kind", ["logprobs", "values", "rewards"])
def test_no_score_depends_on_company(
    kind: str,
    language: tuple[PreTrainedModel, ModelStage],
    scalar: tuple[PreTrainedModel, ModelStage],
) -> None:
    def score(chosen: list[Tokens], budget: int) -> list[Floats]:
        if kind == "logprobs":
            return token_logprobs(language[1], chosen, temperature=1.0, token_budget=budget)
        if kind == "values":
            return values(scalar[1], chosen, token_budget=budget)
        return [np.array([r], np.float32) for r in rewards(scalar[1], chosen, token_budget=budget)]

    samples = samples_of(12)
    alone = [score([sample], 10_000)[0] for sample in samples]
    rng = np.random.default_rng(5)
    for budget in (1, 64, 150, 400, 10_000):
        order = rng.permutation(len(samples))[: rng.integers(2, len(samples) + 1)]
        for i, result in zip(order, score([samples[i] for i in order], budget), strict=True):
            assert result.tobytes() == alone[i].tobytes()


def test_an_empty_response_has_no_scores(language: tuple[PreTrainedModel, ModelStage]) -> None:
    nothing = np.zeros(0, dtype=np.int32)
    samples = [samples_of(1)[0], Tokens(np.array([4, 5], np.int32), nothing)]
    scored = token_logprobs(language[1], samples, temperature=1.0, token_budget=1000)
    assert [len(s) for s in scored] == [len(samples[0].response), 0]
    assert len(token_logprobs(language[1], samples[1:], temperature=1.0, token_budget=9)[0]) == 0
    assert token_logprobs(language[1], [], temperature=1.0, token_budget=9) == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 80))
def test_batches_keep_order_and_budget(lengths: list[int], budget: int) -> None:
    ranges = batches_by_budget(lengths, budget)
    assert [i for r in ranges for i in r] == list(range(len(lengths)))
    for chosen in ranges:
        assert len(chosen) == 1 or sum(lengths[i] for i in chosen) <= budget


TRUNCATED = [
    SamplingParams(temperature=0.7, top_p=0.8, max_tokens=30, stop_token_ids=(3,), min_tokens=4),
    SamplingParams(temperature=1.3, top_k=7, min_p=0.05, max_tokens=30),
]


@pytest.mark.parametrize("params", TRUNCATED)
def test_replayed_logprobs_are_the_samplers(
    params: SamplingParams, language: tuple[PreTrainedModel, ModelStage]
) -> None:
    """At unchanged weights to rounding: of its logits, which follow the engine's batch."""
    stage = language[1]
    engine = TorchEngine(stage, max_num_seqs=8, max_model_len=64, policy_version=0)
    prompts = [sample.prompt for sample in samples_of(12)]
    none = np.zeros(0, np.int32)
    for number, prompt in enumerate(prompts):
        request = Request(
            sample_id=number, prompt=prompt, seed=number, params=params, response=none
        )
        engine.add(request)
    tokens: list[list[int]] = [[] for _ in prompts]
    drawn: list[list[float]] = [[] for _ in prompts]
    while engine.num_running:
        for output in engine.step():
            tokens[output.sample_id] += output.tokens
            drawn[output.sample_id] += output.logprobs
    samples = [Tokens(p, np.array(own, np.int32)) for p, own in zip(prompts, tokens, strict=True)]
    found = replayed_logprobs(stage, samples, params, token_budget=150)
    full = token_logprobs(stage, samples, temperature=params.temperature, token_budget=150)
    alone = [replayed_logprobs(stage, [s], params, token_budget=1)[0] for s in samples]
    for own, plain, engines, single, sample in zip(found, full, drawn, alone, samples, strict=True):
        np.testing.assert_allclose(own.among_kept, engines, atol=1e-5)
        assert own.logprobs.tobytes() == plain.tobytes()
        assert own.among_kept.tobytes() == single.among_kept.tobytes()
        assert own.kept.together.tobytes() == single.kept.together.tobytes()
        again = Kept.apart(own.kept.together, len(sample.response))
        for token, ids in zip(
            sample.response, np.split(again.ids, np.cumsum(again.counts)[:-1]), strict=True
        ):
            assert token in ids
            assert not params.top_k or len(ids) <= params.top_k
    # They are not those of the whole distribution.
    assert np.abs(np.concatenate(full) - np.concatenate(drawn)).mean() > 0.05


def test_what_is_written_down_of_a_position_is_bounded(
    language: tuple[PreTrainedModel, ModelStage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_MOST_KEPT", 5)
    params = SamplingParams(top_p=0.99)
    found = replayed_logprobs(language[1], samples_of(4), params, token_budget=1000)
    for own, sample in zip(found, samples_of(4), strict=True):
        assert set(own.kept.counts.tolist()) <= {5, 6}  # the likeliest, and the drawn one
        lists = np.split(own.kept.ids, np.cumsum(own.kept.counts)[:-1])
        assert all(t in ids for t, ids in zip(sample.response, lists, strict=True))
        assert (own.among_kept > own.logprobs).all()
