"""Laws of the length predictions and of the sources of lengths."""

from pathlib import Path

import numpy as np
import pytest

from rlhfuse.rollout.length_sources import empirical, lognormal, read_lengths, weibull
from rlhfuse.rollout.lengths import LengthModel, stratified
from rlhfuse.sample import Sample


def _sample(i: int, *, group: int = 0, source: str = "", hint: float = 0.0) -> Sample:
    return Sample(
        id=i, group=group, prompt_tokens=8, seed=i, policy_version=0, source=source,
        length_hint=hint,
    )  # fmt: skip


def _mean_final(model: LengthModel, tokens: list[float], groups: list[int]) -> list[float]:
    ids = np.arange(len(tokens))
    so_far = np.array(tokens)
    quantiles = stratified(64, ids)
    left = model.remaining(so_far, quantiles, ids, np.array(groups))
    return [float(x) for x in (left.mean(axis=0) + so_far)]


def test_predictions_match_the_distribution_that_was_seen() -> None:
    """Given 100 tokens so far, the mean of what is predicted is that of longer lengths seen."""
    seen = lognormal(100, 0.8, 4000, 2000)
    model = LengthModel(2000, seen)
    (predicted,) = _mean_final(model, [100.0], [0])
    truth = np.mean([n for n in seen if n > 100])
    assert predicted == pytest.approx(truth, rel=0.03)


def test_sources_scale_what_is_expected() -> None:
    model = LengthModel(4000)
    first = [_sample(i, group=i, source="long" if i % 2 else "short") for i in range(200)]
    model.begin(first)
    for sample in first:
        model.observe(1000 if sample.source == "long" else 100, sample)
    later = [_sample(1000, source="long"), _sample(1001, source="short"), _sample(1002)]
    model.begin(later)
    long, short, unknown = (model.expected_tokens(s) for s in later)
    assert long > 900
    assert short < 160
    assert short < unknown < long


def test_hints_are_calibrated_by_what_came_of_them() -> None:
    """Hints that are half of the truth are doubled in the next iteration."""
    model = LengthModel(4000)
    first = [_sample(i, group=i, hint=50.0 + i) for i in range(100)]
    model.begin(first)
    for sample in first:
        model.observe(int(2 * sample.length_hint), sample)
    model.begin([_sample(500, hint=300.0)])
    assert model.expected_tokens(_sample(500, hint=300.0)) == pytest.approx(600, rel=0.01)


def _learned(alike: bool, seed: int) -> LengthModel:
    rng = np.random.default_rng(seed)
    model = LengthModel(100_000)
    samples = [_sample(i, group=i // 8) for i in range(800)]
    model.begin(samples)
    mean = np.repeat(rng.lognormal(6.0, 1.0, 100), 8) if alike else np.full(800, 400.0)
    for sample, expected in zip(samples, mean.tolist(), strict=True):
        model.observe(int(rng.exponential(expected)) + 1, sample)
    model.begin([_sample(i, group=i // 2) for i in range(4)])
    return model


def test_siblings_tell_of_each_other_where_groups_were_alike() -> None:
    model = _learned(True, 0)
    model.observe(20, _sample(10, group=0))  # a short sibling, and a long one elsewhere
    model.observe(5000, _sample(11, group=1))
    of_short, of_long = _mean_final(model, [10.0, 10.0], [0, 1])
    assert of_long > 1.5 * of_short


def test_siblings_tell_nothing_where_groups_were_not_alike() -> None:
    model = _learned(False, 0)
    model.observe(20, _sample(10, group=0))
    model.observe(5000, _sample(11, group=1))
    of_short, of_long = _mean_final(model, [10.0, 10.0], [0, 1])
    assert of_long == pytest.approx(of_short, rel=0.25)


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_recorded_lengths_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"lengths.{suffix}"
    path.write_text(
        "prompt,response_tokens\na,3\nb,7\n"
        if suffix == "csv"
        else '{"step": 1, "lengths": [3]}\n7\n'
    )
    assert read_lengths(path) == [3, 7]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "x,y\n1,2\n", "none of the columns"),
        ("a.jsonl", '{"response_tokens": 0}\n', "line 1: 0 is not a length"),
        ("a.jsonl", "nonsense\n", "line 1: not JSON"),
        ("a.csv", "tokens\n", "holds no lengths"),
    ],
)
def test_mistakes_in_files_are_named(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lengths(tmp_path / name)


def test_distributions_are_what_they_say() -> None:
    assert np.median(lognormal(100, 0.5, 4001, 10_000)) == pytest.approx(100, rel=0.05)
    assert np.mean(weibull(100, 1.0, 4000, 10_000)) == pytest.approx(100, rel=0.05)
    assert set(empirical([5, 9], 50, 8)) == {5, 8}
    with pytest.raises(ValueError, match="none were recorded"):
        empirical([], 1, 8)


def test_one_end_says_little_of_many_that_go_on() -> None:
    """First iteration: 30 samples have 780 tokens, one ended at 800; the rest goes on."""
    model = LengthModel(4000)
    model.begin([_sample(i, group=i) for i in range(60)])
    for i in range(29):
        model.observe(20 * (i + 1), _sample(i, group=i))
    model.observe(800, _sample(29, group=29))
    finals = _mean_final(model, [780.0] * 30, list(range(30, 60)))
    assert np.mean(finals) > 1000
