"""Everything that the quick start trains on: data, tokenizer, warmed-up policy, reward model."""

import contextlib
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhfuse.quickstart import corpus
from rlhfuse.quickstart.tokenizer import train_tokenizer
from rlhfuse.training.supervised import (
    Progress,
    SupervisedResult,
    SupervisedSettings,
    finetune,
    train_reward_model,
)

MANIFEST = "manifest.json"
FORMAT = 1  # raised when the same inputs would make other files


@dataclass(frozen=True, kw_only=True)
class QuickstartSettings:
    """Sizes of data and models, and how long each is trained."""

    seed: int = 1
    num_demonstrations: int = 2400
    num_pairs: int = 600
    num_train: int = 1024
    num_test: int = 128
    vocab_size: int = 1024
    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 2
    max_length: int = 1024
    policy: SupervisedSettings = field(
        default_factory=lambda: SupervisedSettings(
            batch_tokens=512, learning_rate=2e-3, held_out_fraction=0.04
        )
    )
    reward: SupervisedSettings = field(
        default_factory=lambda: SupervisedSettings(
            batch_tokens=2048, learning_rate=5e-4, held_out_fraction=0.15
        )
    )


@dataclass(frozen=True)
class Prepared:
    """`fresh` is False where the folder already held what was asked for. Losses and accuracy
    are of held-out rows; seconds are those of the training that made the files."""

    folder: str
    fresh: bool
    policy_loss: float
    policy_s: float
    reward_loss: float
    reward_accuracy: float
    reward_s: float


OnStep = Callable[[str, Progress], None]


def prepare(
    folder: str | Path = "assets/quickstart",
    settings: QuickstartSettings | None = None,
    *,
    num_threads: int = 2,
    on_step: OnStep | None = None,
) -> Prepared:
    """Make ``policy/ reward/ train.jsonl test.jsonl sft.jsonl pairs.jsonl`` and a manifest below
    `folder`, or do nothing where a manifest says that the same inputs made the files that are
    there. Written aside and renamed: `folder` is whole, or as it was. `on_step` hears of every
    training step, with "policy" or "reward". Raises ValueError where `folder` holds other things.
    """
    settings = settings or QuickstartSettings()
    folder = Path(folder)
    found = _read_manifest(folder, settings)
    if found is not None:
        return found
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder}: not made by this command; empty it or give another folder")
    aside = folder.with_name(folder.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with _threads(num_threads):
        policy, reward = _make(aside, settings, on_step)
    assert policy.held_out_loss is not None
    assert reward.held_out_loss is not None
    assert reward.held_out_accuracy is not None
    prepared = Prepared(
        str(folder),
        True,
        policy.held_out_loss,
        policy.seconds,
        reward.held_out_loss,
        reward.held_out_accuracy,
        reward.seconds,
    )
    _write_manifest(aside, settings, prepared)
    shutil.rmtree(folder, ignore_errors=True)
    aside.rename(folder)
    return prepared


def write_data(folder: Path, settings: QuickstartSettings) -> list[str]:
    """Write the four JSONL files and return all texts that the tokenizer must know."""
    rng = random.Random(settings.seed)
    training, held_out = corpus.split_questions(rng, settings.num_test)
    demonstrations = [(q, corpus.demonstration(rng, q)) for q in _draw(rng, training, settings)]
    pairs = [corpus.preference_pair(rng, rng.choice(training)) for _ in range(settings.num_pairs)]
    _write_jsonl(
        folder / "sft.jsonl",
        [{"prompt": _chat(q), "response": answer.text} for q, answer in demonstrations],
    )
    _write_jsonl(
        folder / "pairs.jsonl",
        [
            {"prompt": _chat(p.question), "chosen": p.chosen.text, "rejected": p.rejected.text}
            for p in pairs
        ],
    )
    _write_jsonl(folder / "train.jsonl", _prompt_rows(training[: settings.num_train], "train"))
    _write_jsonl(folder / "test.jsonl", _prompt_rows(held_out, "test"))
    return [text for q, answer in demonstrations for text in (q.text, answer.text)]


def _draw(
    rng: random.Random, questions: list[corpus.Question], settings: QuickstartSettings
) -> list[corpus.Question]:
    return [rng.choice(questions) for _ in range(settings.num_demonstrations)]


def _make(
    folder: Path, settings: QuickstartSettings, on_step: OnStep | None
) -> tuple[SupervisedResult, SupervisedResult]:
    tokenizer = train_tokenizer(
        write_data(folder, settings), settings.vocab_size, settings.max_length
    )
    torch.manual_seed(settings.seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        max_position_embeddings=settings.max_length,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    start = folder / "start"
    LlamaForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    policy = finetune(
        start, folder / "sft.jsonl", folder / "policy", settings.policy, _named("policy", on_step)
    )
    shutil.rmtree(start)
    reward = train_reward_model(
        folder / "policy",
        folder / "pairs.jsonl",
        folder / "reward",
        settings.reward,
        _named("reward", on_step),
    )
    return policy, reward


def _named(name: str, on_step: OnStep | None) -> Callable[[Progress], None] | None:
    if on_step is None:
        return None
    return lambda progress: on_step(name, progress)


def _chat(question: corpus.Question) -> list[dict[str, str]]:
    return [{"role": "user", "content": question.text}]


def _prompt_rows(questions: list[corpus.Question], split: str) -> list[dict[str, object]]:
    return [
        {
            "prompt": _chat(question),
            "data_source": corpus.DATA_SOURCE,
            "reward_model": {"style": "rule", "ground_truth": "; ".join(question.topic.nouns)},
            "extra_info": {"split": split, "index": index},
        }
        for index, question in enumerate(questions)
    ]


def _write_jsonl(path: Path, rows: list[dict[str, object]]) -> None:
    with path.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(row) + "\n" for row in rows)


@contextlib.contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _inputs_digest(settings: QuickstartSettings) -> str:
    """Digest of all that decides the files: the settings and the code that writes the texts."""
    digest = hashlib.sha256(f"{FORMAT} {settings}".encode())
    for name in ("words.py", "corpus.py", "tokenizer.py"):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()


def _file_digests(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def _write_manifest(folder: Path, settings: QuickstartSettings, prepared: Prepared) -> None:
    manifest = {
        "inputs": _inputs_digest(settings),
        "result": asdict(prepared),
        "files": _file_digests(folder),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def _read_manifest(folder: Path, settings: QuickstartSettings) -> Prepared | None:
    """What made the files in `folder`, if the same inputs did and the files are unchanged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    manifest = json.loads(path.read_text())
    if manifest.get("inputs") != _inputs_digest(settings):
        return None
    if manifest.get("files") != _file_digests(folder):
        return None
    return Prepared(**{**manifest["result"], "folder": str(folder), "fresh": False})
