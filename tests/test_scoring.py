"""Scores are those of a plain forward pass, and the same bits in whatever company."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from rlhfuse.models.loading import load_model
from rlhfuse.models.stage import Head, ModelStage
from rlhfuse.scoring import Floats, Tokens, batches_by_budget, rewards, token_logprobs, values
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
