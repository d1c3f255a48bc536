"""Supervised training: padding is invisible, batches lose no row, and training learns."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhfuse.quickstart.tokenizer import train_tokenizer
from rlhfuse.training.supervised import (
    Encoded,
    SupervisedSettings,
    finetune,
    load_tokenizer,
    make_batches,
    preference_loss,
    read_rows,
    response_loss,
    train_reward_model,
)

TEXTS = ["good day to you", "bad day to you", "what is the weather"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(TEXTS * 5, 320, 64)
    torch.manual_seed(0)
    LlamaForCausalLM(_config(len(tokenizer))).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def _config(vocab_size: int) -> LlamaConfig:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
    )
    config.num_labels = 1  # one score: what a reward model has
    return config


def _write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    budget=st.integers(1, 200),
    seed=st.integers(0, 100),
)
def test_batches_hold_every_row_once_within_the_budget(
    sizes: list[int], budget: int, seed: int
) -> None:
    batches = make_batches(sizes, budget, random.Random(seed))
    assert sorted(i for batch in batches for i in batch) == list(range(len(sizes)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(sizes[i] for i in batch) <= budget


def test_losses_do_not_see_padding() -> None:
    torch.manual_seed(0)
    policy = LlamaForCausalLM(_config(50))
    judge = LlamaForSequenceClassification(_config(50))
    long = Encoded(tuple(range(1, 21)), 4)
    short = Encoded((3, 4, 5, 6, 7), 2)
    counts = [16, 3]
    alone = [response_loss(policy, [row], 0).item() for row in (long, short)]
    mean = sum(c * a for c, a in zip(counts, alone, strict=True)) / sum(counts)
    assert response_loss(policy, [long, short], 0).item() == pytest.approx(mean, rel=1e-5)

    score = [judge(torch.tensor([row.tokens])).logits.item() for row in (long, short)]
    loss, accuracy = preference_loss(judge, [[long, short]], 0, 0.0)
    wanted = -torch.nn.functional.logsigmoid(torch.tensor(score[0] - score[1]))
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-6)
    assert accuracy == float(score[0] > score[1])


def test_finetuning_learns_and_repeats(model: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "what is the weather"}]
    rows = _write(tmp_path / "rows.jsonl", [{"prompt": chat, "response": "good day to you"}] * 40)
    settings = SupervisedSettings(epochs=12, batch_tokens=128, learning_rate=1e-2)
    steps: list[int] = []
    first = finetune(model, rows, tmp_path / "a", settings, lambda p: steps.append(p.step))
    again = finetune(model, rows, tmp_path / "b", settings)
    assert first.losses == again.losses
    assert steps == list(range(1, len(first.losses) + 1))
    assert first.held_out_loss is not None
    assert first.held_out_loss < 0.1 * first.losses[0]
    tokenizer = load_tokenizer(tmp_path / "a")
    ids = tokenizer("<s><|user|>what is the weather<|assistant|>")["input_ids"]
    start = len(ids)
    network = LlamaForCausalLM.from_pretrained(tmp_path / "a")
    while ids[-1] != tokenizer.eos_token_id and len(ids) < start + 20:
        ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids[start:-1]) == "good day to you"


def test_a_reward_model_learns_the_preference(model: Path, tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": TEXTS[2] + " " * i, "chosen": TEXTS[0], "rejected": TEXTS[1]} for i in range(20)
    ]
    pairs = _write(tmp_path / "pairs.jsonl", rows)
    settings = SupervisedSettings(
        epochs=4, batch_tokens=256, learning_rate=5e-3, held_out_fraction=0.25
    )
    result = train_reward_model(model, pairs, tmp_path / "reward", settings)
    assert result.held_out_rows == 5
    assert result.held_out_accuracy == 1.0
    assert result.losses[-1] < 0.3 < result.losses[0]


def test_mistakes_are_named_with_their_place(model: Path, tmp_path: Path) -> None:
    good = _write(tmp_path / "good.jsonl", [{"prompt": "a", "response": "b"}])
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"bad\.jsonl:2: not JSON"):
        read_rows(bad)
    lacking = _write(tmp_path / "lacking.jsonl", [{"prompt": "a", "answer": "b"}])
    with pytest.raises(ValueError, match=r"lacking\.jsonl:1: 'response' must be text"):
        finetune(model, lacking, tmp_path / "out")
    with pytest.raises(ValueError, match="Hugging Face model folder"):
        finetune(tmp_path / "nowhere", good, tmp_path / "out")
    with pytest.raises(ValueError, match="exists already"):
        finetune(model, good, model)
    assert not (tmp_path / "out").exists()
