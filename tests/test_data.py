"""Rows in, prompts out; every row once an epoch, and an interrupted stream goes on exactly."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhfuse.config import ActorConfig, Config, DataConfig, RewardConfig
from rlhfuse.data import (
    ChatMessage,
    PromptStream,
    Row,
    check_tokenizers,
    encode_prompts,
    load_rows,
    load_tokenizer,
)

WORDS = ["<pad>", "<eos>", "<user>", "<model>", "one", "two", "three", "what", "is"]
TEMPLATE = (
    "{% for m in messages %}<user> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<model>{% endif %}"
)


def _tokenizer(template: str | None = TEMPLATE, extra: tuple[str, ...] = ()) -> Any:
    vocabulary = {word: index for index, word in enumerate([*WORDS, *extra])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


def _jsonl(path: Path, *rows: object) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


CHAT = {
    "prompt": [{"role": "user", "content": "what is"}],
    "data_source": "math",
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "two"},
    "extra_info": {"index": 3},
}


def test_chat_rows_and_plain_rows(tmp_path: Path) -> None:
    plain = {"prompt": "what is", "answer": "one"}
    rows = load_rows([_jsonl(tmp_path / "easy.jsonl", CHAT, plain)], DataConfig())
    assert rows[0] == Row(
        prompt=(ChatMessage("user", "what is"),),
        data_source="math",
        ground_truth="two",
        extra_info={"index": 3},
        place=f"{tmp_path / 'easy.jsonl'}:1",
    )
    assert (rows[1].prompt, rows[1].ground_truth) == ("what is", "one")
    assert rows[1].data_source == "easy"


def test_keys_can_be_named(tmp_path: Path) -> None:
    file = _jsonl(tmp_path / "a.jsonl", {"question": "what", "solution": 4})
    (row,) = load_rows([file], DataConfig(prompt_key="question", answer_key="solution"))
    assert (row.prompt, row.ground_truth) == ("what", 4)


def test_parquet_and_jsonl_hold_the_same_rows(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist([CHAT, CHAT]), tmp_path / "a.parquet")
    _jsonl(tmp_path / "a.jsonl", CHAT, CHAT)
    first = load_rows([tmp_path / "a.parquet"], DataConfig())
    second = load_rows([tmp_path / "a.jsonl"], DataConfig())
    assert [(r.prompt, r.ground_truth, r.extra_info) for r in first] == [
        (r.prompt, r.ground_truth, r.extra_info) for r in second
    ]


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{not json", "not valid JSON"),
        ("[1]", "expected an object"),
        ('{"question": "x"}', "no 'prompt' (data.prompt_key); it has: question"),
        ('{"prompt": ""}', "prompt is empty"),
        ('{"prompt": 3}', "prompt must be text or a list"),
        ('{"prompt": [{"role": "user"}]}', "prompt.0 must be"),
        ('{"prompt": [{"role": "usr", "content": "x"}]}', "prompt.0.role must be one of"),
        ('{"prompt": "x", "reward_model": {"style": "rule"}}', "ground_truth"),
        ('{"prompt": "x", "extra_info": []}', "extra_info must be an object"),
        ('{"prompt": "x", "data_source": 1}', "data_source must be text"),
    ],
)
def test_a_malformed_row_names_file_and_line(tmp_path: Path, line: str, part: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "x"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"a\.jsonl:3: ") as caught:
        load_rows([file], DataConfig())
    assert part in str(caught.value)


def test_an_empty_data_set_and_unreadable_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty.*a\.jsonl"):
        load_rows([tmp_path / "a.jsonl"], DataConfig())
    with pytest.raises(ValueError, match=r"b\.jsonl: cannot read"):
        load_rows([tmp_path / "b.jsonl"], DataConfig())
    (tmp_path / "c.parquet").write_text("x")
    with pytest.raises(ValueError, match=r"c\.parquet: "):
        load_rows([tmp_path / "c.parquet"], DataConfig())


def _rows(*prompts: str | tuple[ChatMessage, ...]) -> list[Row]:
    return [Row(prompt, "s", None, {}, f"f:{i}") for i, prompt in enumerate(prompts, start=1)]


def _ids(rows: list[Row], config: DataConfig, tokenizer: Any = None) -> list[list[int]]:
    prompts = encode_prompts(rows, tokenizer or _tokenizer(), config)
    return [prompt.tokens.tolist() for prompt in prompts]


def test_text_stays_text_and_messages_go_through_the_template() -> None:
    chat = (ChatMessage("user", "what is"),)
    assert _ids(_rows("what is", chat), DataConfig()) == [[7, 8], [2, 7, 8, 3]]
    on = DataConfig(apply_chat_template="on")
    assert _ids(_rows("what is", chat), on) == [[2, 7, 8, 3], [2, 7, 8, 3]]
    with pytest.raises(ValueError, match=r"f:1.*apply_chat_template is off"):
        _ids(_rows(chat), DataConfig(apply_chat_template="off"))
    with pytest.raises(ValueError, match=r"f:1.*has none"):
        _ids(_rows(chat), DataConfig(), _tokenizer(template=None))


def test_overlong_prompts(caplog: pytest.LogCaptureFixture) -> None:
    rows = _rows("one", "one two three", "two")
    with pytest.raises(ValueError, match=r"1 of 3 prompts.*f:2 \(3 tokens\)"):
        _ids(rows, DataConfig(max_prompt_length=2))
    kept = DataConfig(max_prompt_length=2, overlong_prompts="filter")
    assert _ids(rows, kept) == [[4], [5]]
    assert "left out" in caplog.text
    cut = DataConfig(max_prompt_length=2, overlong_prompts="truncate_left")
    assert _ids(rows, cut) == [[4], [5, 6], [5]]
    with pytest.raises(ValueError, match="data set is empty"):
        _ids(_rows("one two three"), kept)
    with pytest.raises(ValueError, match="f:1: the prompt has no tokens"):
        _ids(_rows("  "), DataConfig())


def _folder(path: Path, vocab_size: int, tokenizer: Any = None) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size}))
    if tokenizer is not None:
        tokenizer.save_pretrained(path)
    return str(path)


def test_models_must_know_the_actors_token_ids(tmp_path: Path) -> None:
    def check(reward: str) -> None:
        config = Config(actor=ActorConfig(path=actor), reward=RewardConfig(path=reward))
        check_tokenizers(config, load_tokenizer(actor))

    actor = _folder(tmp_path / "actor", 16, _tokenizer())
    check(_folder(tmp_path / "same", 9, _tokenizer()))
    check(_folder(tmp_path / "none", 9))
    with pytest.raises(ValueError, match=r"reward\.path.*below 8.*up to 8"):
        check(_folder(tmp_path / "small", 8))
    with pytest.raises(ValueError, match=r"reward\.path.*differs"):
        check(_folder(tmp_path / "other", 99, _tokenizer(extra=("more",))))
    with pytest.raises(ValueError, match="no such model folder"):
        load_tokenizer(str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="cannot load its tokenizer"):
        load_tokenizer(str(tmp_path / "none"))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    batch=st.integers(1, 50),
    seed=st.integers(-5, 5),
    shuffle=st.booleans(),
    stop=st.integers(0, 12),
)
def test_every_row_once_an_epoch_and_resuming_changes_nothing(
    rows: int, batch: int, seed: int, shuffle: bool, stop: int
) -> None:
    whole = PromptStream(range(rows), batch, seed, shuffle)
    drawn: list[int] = []
    for step in range(12):
        if step == stop:
            resumed = PromptStream(range(rows), batch, seed, shuffle)
            resumed.restore(whole.state)
        drawn += whole.next_batch()
        assert whole.state.epoch * rows + whole.state.index == len(drawn)
        if step >= stop:
            assert resumed.next_batch() == drawn[-batch:]
            assert resumed.state == whole.state
    assert len(drawn) == 12 * batch
    for epoch in range(len(drawn) // rows):
        assert sorted(drawn[epoch * rows : (epoch + 1) * rows]) == list(range(rows))
    if not shuffle:
        assert drawn == [i % rows for i in range(len(drawn))]


def test_epochs_and_seeds_are_shuffled_differently_and_always_the_same() -> None:
    stream = PromptStream(range(8), 8, 1, True)
    first, second = stream.next_batch(), stream.next_batch()
    assert first != second
    assert PromptStream(range(8), 8, 2, True).next_batch() != first
    assert first == [2, 4, 7, 5, 0, 6, 3, 1]  # must not change from one release to the next


def test_a_position_of_other_data_is_refused() -> None:
    state = PromptStream(range(8), 4, 1, True).state
    with pytest.raises(ValueError, match="num_rows 8 and this run has 9"):
        PromptStream(range(9), 4, 1, True).restore(state)
    with pytest.raises(ValueError, match="seed 1 and this run has 2"):
        PromptStream(range(8), 4, 2, True).restore(state)
