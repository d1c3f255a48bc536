"""The quick-start task: what its data promise, and that preparation is whole and repeatable."""

import importlib.util
import json
import random
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhfuse.quickstart import corpus, words
from rlhfuse.quickstart.prepare import MANIFEST, QuickstartSettings, prepare
from rlhfuse.quickstart.tokenizer import train_tokenizer
from rlhfuse.training.supervised import SupervisedSettings

REWARD_FILE = Path(__file__).resolve().parents[1] / "configs" / "reward_quickstart.py"
SMALL = QuickstartSettings(
    num_demonstrations=24,
    num_pairs=12,
    num_train=8,
    num_test=4,
    vocab_size=400,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    policy=SupervisedSettings(batch_tokens=1024, held_out_fraction=0.2),
    reward=SupervisedSettings(batch_tokens=2048, held_out_fraction=0.2),
)


def _compute_score() -> Callable[[str, str, str], float]:
    spec = importlib.util.spec_from_file_location("reward_quickstart", REWARD_FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    score: Callable[[str, str, str], float] = module.compute_score
    return score


def test_every_step_ends_with_a_noun_of_its_own_topic_alone() -> None:
    nouns = [noun for topic in words.TOPICS for noun in topic.nouns]
    assert len(nouns) == len(set(nouns))
    for topic in words.TOPICS:
        others = set(nouns) - set(topic.nouns)
        assert not any(others & set(step.split()) for step in topic.steps)


def test_held_out_prompts_are_not_trained_on() -> None:
    training, held_out = corpus.split_questions(random.Random(3), 100)
    assert len(held_out) == 100
    assert not {q.text for q in training} & {q.text for q in held_out}
    assert len(training) + 100 == len(corpus.all_questions())


def test_answer_lengths_are_long_tailed() -> None:
    rng = random.Random(5)
    questions = corpus.all_questions()
    lengths = sorted(
        len(corpus.demonstration(rng, rng.choice(questions)).text) for _ in range(4000)
    )
    assert lengths[3960] >= 5 * statistics.median(lengths)


def test_preferences_do_not_depend_on_length() -> None:
    rng = random.Random(7)
    questions = corpus.all_questions()
    pairs = [corpus.preference_pair(rng, rng.choice(questions)) for _ in range(1500)]
    assert all(p.chosen.quality - p.rejected.quality >= 0.3 for p in pairs)
    longer = sum(len(p.chosen.moods) > len(p.rejected.moods) for p in pairs)
    shorter = sum(len(p.chosen.moods) < len(p.rejected.moods) for p in pairs)
    # A fair coin's standard deviation is half a root of n: four of them.
    assert abs(longer - shorter) < 4 * (longer + shorter) ** 0.5


@given(seed=st.integers(0, 10_000))
def test_the_rule_based_reward_is_the_quality_of_an_answer(seed: int) -> None:
    rng = random.Random(seed)
    question = rng.choice(corpus.all_questions())
    answer = corpus.demonstration(rng, question)
    score = _compute_score()(corpus.DATA_SOURCE, answer.text, "; ".join(question.topic.nouns))
    assert score == pytest.approx(answer.quality)


@settings(max_examples=30)
@given(text=st.text(max_size=40))
def test_the_tokenizer_loses_nothing(text: str) -> None:
    tokenizer = train_tokenizer(["some words and some more words"], 300, 64)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text


def test_preparation_is_repeatable_whole_and_done_once(tmp_path: Path) -> None:
    first = prepare(tmp_path / "a", SMALL, num_threads=1)
    again = prepare(tmp_path / "a", SMALL, num_threads=1)
    other = prepare(tmp_path / "b", SMALL, num_threads=1)
    assert (first.fresh, again.fresh, other.fresh) == (True, False, True)
    manifests = [json.loads((tmp_path / name / MANIFEST).read_text()) for name in "ab"]
    assert manifests[0]["files"] == manifests[1]["files"]
    assert {"policy/model.safetensors", "reward/tokenizer.json", "test.jsonl"} <= set(
        manifests[0]["files"]
    )
    (tmp_path / "a" / "train.jsonl").write_text("damaged")
    assert prepare(tmp_path / "a", SMALL, num_threads=1).fresh
    assert json.loads((tmp_path / "a" / MANIFEST).read_text())["files"] == manifests[1]["files"]


def test_preparation_never_replaces_a_folder_of_somebody_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not made by this command"):
        prepare(tmp_path, SMALL)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
