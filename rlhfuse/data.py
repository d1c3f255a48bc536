"""Data rows in, encoded prompts out, and the stream of batches with a position to resume from."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from rlhfuse.config import Config, DataConfig

log = logging.getLogger(__name__)
T = TypeVar("T")
Tokenizer = Any  # a Hugging Face tokenizer; transformers carries no types
ROLES = ("system", "user", "assistant", "tool", "developer")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and what its reward needs. `place` is where it stands: ``file:line``."""

    prompt: str | tuple[ChatMessage, ...]
    data_source: str
    ground_truth: object  # any JSON value
    extra_info: Mapping[str, object]
    place: str


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A row and its token ids, int32 of shape (length,)."""

    row: Row
    tokens: npt.NDArray[np.int32] = field(repr=False)


# --- rows ----------------------------------------------------------------------------------


def load_rows(files: Sequence[str | Path], config: DataConfig) -> list[Row]:
    """All rows of JSONL and Parquet files, in order. A bad row is an error that names its line.

    A row has `prompt_key` (text or chat messages) and, as they are needed, ``data_source`` (by
    default the file's name), ``reward_model: {ground_truth}`` or `answer_key`, ``extra_info``.
    """
    rows = [_row(raw, place, config, Path(file)) for file in files for raw, place in _records(file)]
    if not rows:
        raise ValueError(f"the data set is empty: no row in {', '.join(map(str, files))}")
    return rows


def _records(file: str | Path) -> Iterator[tuple[object, str]]:
    if Path(file).suffix == ".parquet":
        yield from _parquet(file)
        return
    try:
        lines = Path(file).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot read the data: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            place = f"{file}:{number}"
            try:
                yield json.loads(line), place
            except json.JSONDecodeError as error:
                raise ValueError(f"{place}: not valid JSON: {error.msg}") from error


def _parquet(file: str | Path) -> Iterator[tuple[object, str]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(
            f"{file}: Parquet needs pyarrow: pip install 'rlhfuse[parquet]'"
        ) from error
    try:
        batches = pyarrow.parquet.ParquetFile(file).iter_batches()
        number = 0
        for batch in batches:
            for raw in batch.to_pylist():
                number += 1
                yield raw, f"{file}: row {number}"
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: cannot read the data: {error}") from error


def _row(raw: object, place: str, config: DataConfig, file: Path) -> Row:
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: expected an object with keys, got {type(raw).__name__}")
    if config.prompt_key not in raw:
        keys = ", ".join(map(str, raw))
        raise ValueError(f"{place}: no {config.prompt_key!r} (data.prompt_key); it has: {keys}")
    source = raw.get("data_source")
    extra = raw.get("extra_info")
    if not isinstance(source, str | None):
        raise ValueError(f"{place}: data_source must be text, got {source!r}")
    if not isinstance(extra, dict | None):
        raise ValueError(f"{place}: extra_info must be an object, got {extra!r}")
    return Row(
        prompt=_prompt(raw[config.prompt_key], f"{place}: {config.prompt_key}"),
        data_source=source or file.stem,
        ground_truth=_ground_truth(raw, place, config),
        extra_info=extra or {},
        place=place,
    )


def _ground_truth(raw: dict[str, object], place: str, config: DataConfig) -> object:
    model = raw.get("reward_model")
    if model is None:
        return raw.get(config.answer_key)
    if not isinstance(model, dict) or "ground_truth" not in model:
        raise ValueError(f"{place}: reward_model must be an object with ground_truth")
    return model["ground_truth"]


def _prompt(value: object, place: str) -> str | tuple[ChatMessage, ...]:
    if isinstance(value, str):
        if not value:
            raise ValueError(f"{place} is empty")
        return value
    if not isinstance(value, list) or not value:
        raise ValueError(f"{place} must be text or a list of chat messages, got {value!r:.60}")
    return tuple(_message(item, f"{place}.{index}") for index, item in enumerate(value))


def _message(item: object, place: str) -> ChatMessage:
    role = item.get("role") if isinstance(item, dict) else None
    content = item.get("content") if isinstance(item, dict) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"{place} must be {{role: text, content: text}}, got {item!r:.60}")
    if role not in ROLES:
        raise ValueError(f"{place}.role must be one of {', '.join(ROLES)}, got {role!r}")
    return ChatMessage(role, content)


# --- tokens --------------------------------------------------------------------------------


def load_tokenizer(folder: str) -> Tokenizer:
    """The tokenizer in a Hugging Face model folder; reads local files only."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: there is no such model folder")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{folder}: cannot load its tokenizer: {reason}") from error


def check_tokenizers(config: Config, tokenizer: Tokenizer) -> None:
    """Raise a `ValueError` where a model cannot read the token ids of the actor's `tokenizer`.

    Its vocabulary must be large enough, and a tokenizer that it brings must be the same one.
    """
    folders = {
        "actor.path": config.actor.path,
        "critic.path": config.critic.path if config.uses_critic else "",
        "reference.path": config.reference.path,
        "reward.path": config.reward.path,
    }
    for place, folder in folders.items():
        if folder:
            _check_tokenizer(tokenizer, folder, place, own=place == "actor.path")


def _check_tokenizer(tokenizer: Tokenizer, folder: str, place: str, *, own: bool) -> None:
    try:
        settings = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{place}: cannot read {folder}/config.json: {error}") from error
    size = settings.get("vocab_size", settings.get("text_config", {}).get("vocab_size"))
    highest = max(tokenizer.get_vocab().values())
    if size is not None and highest >= size:
        raise ValueError(
            f"{place}: the model in {folder} knows token ids below {size}, but the actor's "
            f"tokenizer goes up to {highest}: they do not belong together"
        )
    names = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    if own or not any((Path(folder) / name).exists() for name in names):
        return
    theirs = load_tokenizer(folder).get_vocab()
    if theirs != tokenizer.get_vocab():
        raise ValueError(
            f"{place}: the tokenizer in {folder} differs from the actor's, so token ids would "
            "mean different words; use models that share one tokenizer"
        )


def encode_prompts(rows: Sequence[Row], tokenizer: Tokenizer, config: DataConfig) -> list[Prompt]:
    """Token ids of every row's prompt, under the policy for prompts that are too long."""
    prompts = []
    overlong: list[Prompt] = []
    for row in rows:
        prompt = Prompt(row, np.asarray(_encode(row, tokenizer, config), dtype=np.int32))
        if not len(prompt.tokens):
            raise ValueError(f"{row.place}: the prompt has no tokens")
        if len(prompt.tokens) > config.max_prompt_length:
            overlong.append(prompt)
            if config.overlong_prompts != "truncate_left":
                continue
            prompt = Prompt(row, prompt.tokens[-config.max_prompt_length :].copy())
        prompts.append(prompt)
    if overlong:
        _tell_overlong(overlong, len(rows), config)
    if not prompts:
        raise ValueError(
            "the data set is empty: every prompt is longer than data.max_prompt_length "
            f"{config.max_prompt_length}"
        )
    return prompts


def _tell_overlong(overlong: Sequence[Prompt], total: int, config: DataConfig) -> None:
    first = overlong[0]
    what = (
        f"{len(overlong)} of {total} prompts are longer than data.max_prompt_length "
        f"{config.max_prompt_length}, the first at {first.row.place} ({len(first.tokens)} tokens)"
    )
    if config.overlong_prompts == "error":
        raise ValueError(f"{what}; set data.overlong_prompts to filter or truncate_left")
    done = "left out" if config.overlong_prompts == "filter" else "cut on the left"
    log.warning("%s: %s", what, done)


def _encode(row: Row, tokenizer: Tokenizer, config: DataConfig) -> list[int]:
    prompt, wanted = row.prompt, config.apply_chat_template
    if isinstance(prompt, str) and wanted != "on":
        return _encode_text(prompt, tokenizer)
    if wanted == "off":
        raise ValueError(f"{row.place}: chat messages, but data.apply_chat_template is off")
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{row.place}: chat messages need a chat template and the actor's tokenizer has none; "
            "give the prompt as text"
        )
    messages = (ChatMessage("user", prompt),) if isinstance(prompt, str) else prompt
    text = tokenizer.apply_chat_template(
        [{"role": message.role, "content": message.content} for message in messages],
        add_generation_prompt=True,
        tokenize=False,
    )
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _encode_text(text: str, tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = tokenizer(text)["input_ids"]
    end = tokenizer.eos_token_id
    # Some tokenizers close every text; a prompt that goes on must not be closed.
    if ids and end is not None and ids[-1] == end and not text.endswith(tokenizer.eos_token):
        return ids[:-1]
    return ids


# --- batches -------------------------------------------------------------------------------


class StreamState(msgspec.Struct, frozen=True, kw_only=True):
    """Where a stream stands: `index` rows of `epoch` are used; 0 <= index < num_rows."""

    epoch: int = 0
    index: int = 0
    num_rows: int
    seed: int
    shuffle: bool


class PromptStream(Generic[T]):
    """Endless batches of exactly `batch_size` rows, in an order fixed by (seed, epoch).

    A batch that an epoch does not fill goes on with the next epoch's first rows, so every row
    comes exactly once an epoch and no batch is short or lost.
    """

    def __init__(self, rows: Sequence[T], batch_size: int, seed: int, shuffle: bool) -> None:
        assert rows
        assert batch_size > 0
        self._rows = rows
        self._batch_size = batch_size
        self._state = StreamState(num_rows=len(rows), seed=seed, shuffle=shuffle)
        self._order = self._order_of(0)

    @property
    def state(self) -> StreamState:
        """The position before the next batch; store it with the checkpoint."""
        return self._state

    def restore(self, state: StreamState) -> None:
        """Go on at `state`, of a stream over the same rows; `ValueError` where they differ."""
        for name in ("num_rows", "seed", "shuffle"):
            saved, now = getattr(state, name), getattr(self._state, name)
            if saved != now:
                raise ValueError(
                    f"the checkpoint's data position has {name} {saved} and this run has {now}; "
                    "resume with the data and settings of the interrupted run"
                )
        if not (0 <= state.index < state.num_rows and state.epoch >= 0):
            raise ValueError(f"the checkpoint's data position is not valid: {state}")
        self._state = state
        self._order = self._order_of(state.epoch)

    def next_batch(self) -> list[T]:
        """The next `batch_size` rows."""
        batch: list[T] = []
        epoch, index = self._state.epoch, self._state.index
        while len(batch) < self._batch_size:
            taken = self._order[index : index + self._batch_size - len(batch)]
            batch += [self._rows[row] for row in taken]
            index += len(taken)
            if index == len(self._rows):
                epoch, index = epoch + 1, 0
                self._order = self._order_of(epoch)
        self._state = msgspec.structs.replace(self._state, epoch=epoch, index=index)
        return batch

    def _order_of(self, epoch: int) -> npt.NDArray[np.intp]:
        count = len(self._rows)
        if not self._state.shuffle:
            return np.arange(count)
        # A bit generator's raw stream is promised to stay the same over numpy versions.
        entropy = [self._state.seed & (2**64 - 1), epoch]
        raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(count)
        return np.argsort(raw, kind="stable")
