"""Means and pass@k against their definitions."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhfuse.evaluation import ScoredResponse, evaluate, pass_at_k


@given(passed=st.lists(st.booleans(), min_size=1, max_size=7), data=st.data())
def test_pass_at_k_is_the_share_of_all_choices_of_k(
    passed: list[bool], data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, len(passed)))
    choices = [any(choice) for choice in itertools.combinations(passed, k)]
    assert pass_at_k(len(passed), sum(passed), k) == pytest.approx(sum(choices) / len(choices))


def test_more_tries_than_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="k=3"):
        pass_at_k(2, 1, 3)


def _scores(prompt: str, source: str, *scores: float) -> list[ScoredResponse]:
    return [ScoredResponse(prompt, source, score, {"words": 2 * score}) for score in scores]


def test_one_source() -> None:
    responses = _scores("a", "math", 1, 0, 0, 0) + _scores("b", "math", 1, 1, 1, 1)
    metrics = evaluate(responses, "held-out", 0.5)
    assert next(iter(metrics)) == "val-core/held-out/reward/mean@4"
    assert metrics == pytest.approx(
        {
            "val-core/held-out/reward/mean@4": (0.25 + 1) / 2,
            "val-core/held-out/reward/pass@4": 1.0,
            "val-aux/held-out/reward/pass@1": (0.25 + 1) / 2,
            "val-aux/held-out/reward/pass@2": (0.5 + 1) / 2,
            "val-aux/held-out/reward/std@4": (0.1875**0.5 + 0) / 2,
            "val-aux/held-out/reward/best@4": 1.0,
            "val-aux/held-out/reward/worst@4": 0.5,
            "val-aux/held-out/words/mean@4": 1.25,
        }
    )


def test_sources_are_told_apart_and_the_order_of_responses_does_not_matter() -> None:
    responses = _scores("a", "math", 1.0) + _scores("b", "code", 0.0) + _scores("c", "code", 1.0)
    metrics = evaluate(responses, "v", 0.5)
    assert metrics["val-core/v/math/reward/mean@1"] == 1.0
    assert metrics["val-core/v/code/reward/pass@1"] == 0.5
    assert metrics["val-core/v/reward/mean@1"] == pytest.approx(2 / 3)
    assert evaluate(responses[::-1], "v", 0.5) == metrics


def test_the_threshold_decides_what_passes() -> None:
    responses = _scores("a", "s", 0.5, 0.6)
    assert evaluate(responses, "v", 0.5)["val-aux/v/reward/pass@1"] == 0.5
    assert evaluate(responses, "v", 0.4)["val-aux/v/reward/pass@1"] == 1.0


def test_no_responses_no_metrics() -> None:
    assert evaluate([], "v", 0.5) == {}
