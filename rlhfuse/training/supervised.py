"""Supervised fine-tuning and reward-model training of Hugging Face model folders.

Single process, plain torch: what comes before RLHF. Rows are JSON lines. Fine-tuning reads
``{"prompt": text or chat messages, "response": text}``; reward-model training reads
``{"prompt": ..., "chosen": text, "rejected": text}``. A chat prompt goes through the tokenizer's
chat template; a response is tokenized on its own and closed with the end-of-sequence token, so
that training sees exactly the token sequences that generation will produce.
"""

import json
import logging
import math
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

logger = logging.getLogger(__name__)

Row = dict[str, object]


@dataclass(frozen=True, kw_only=True)
class SupervisedSettings:
    """How long and how fast. `batch_tokens` counts padded tokens of one optimizer step (of both
    sides of a pair); `center` pulls a pair's two scores towards opposite signs, which fixes the
    free constant of the Bradley-Terry model."""

    epochs: float = 1.0
    batch_tokens: int = 2048
    learning_rate: float = 1e-4
    warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    held_out_fraction: float = 0.05
    center: float = 0.01
    seed: int = 1

    def __post_init__(self) -> None:
        if self.epochs <= 0 or self.batch_tokens < 1 or self.learning_rate <= 0:
            raise ValueError("epochs, batch_tokens and learning_rate must be above 0")
        if not 0 <= self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction={self.held_out_fraction} must be in [0, 1)")


@dataclass(frozen=True)
class Progress:
    """One optimizer step is done; `loss` is its own."""

    step: int
    num_steps: int
    loss: float


@dataclass(frozen=True)
class SupervisedResult:
    """`losses` has one number per step. `held_out_loss` and `held_out_accuracy` (share of pairs
    whose chosen side scores higher; reward models only) are None where nothing was held out."""

    losses: tuple[float, ...]
    num_tokens: int
    seconds: float
    held_out_rows: int
    held_out_loss: float | None
    held_out_accuracy: float | None = None


@dataclass(frozen=True)
class Encoded:
    """One sequence: prompt and response; `prompt_tokens` of them are the prompt."""

    tokens: tuple[int, ...]
    prompt_tokens: int


OnProgress = Callable[[Progress], None]
# The sequences that one row puts into a batch, and the loss (and the share of correctly ordered
# pairs) of the rows of one batch.
Encoder = Callable[[Row, str], list[Encoded]]
BatchLoss = Callable[[PreTrainedModel, list[list[Encoded]]], tuple[torch.Tensor, float]]


def finetune(
    model: str | Path,
    rows: str | Path,
    output: str | Path,
    settings: SupervisedSettings | None = None,
    on_progress: OnProgress | None = None,
) -> SupervisedResult:
    """Fine-tune the causal language model in folder `model` on the responses in the JSONL file
    `rows` (mean negative log-likelihood of response tokens) and save model and tokenizer to the
    new folder `output`. Raises ValueError for unusable input."""
    settings = settings or SupervisedSettings()
    tokenizer = load_tokenizer(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    pad = _pad_id(tokenizer, model)

    def encode(row: Row, where: str) -> list[Encoded]:
        return [encode_row(tokenizer, row, "response", where, settings.max_length)]

    def loss(network: PreTrainedModel, batch: list[list[Encoded]]) -> tuple[torch.Tensor, float]:
        return response_loss(network, [row[0] for row in batch], pad), 0.0

    return _train(network, tokenizer, Path(rows), Path(output), settings, encode, loss, on_progress)


def train_reward_model(
    model: str | Path,
    pairs: str | Path,
    output: str | Path,
    settings: SupervisedSettings | None = None,
    on_progress: OnProgress | None = None,
) -> SupervisedResult:
    """Train a reward model (one score, read at the last real token) on the preference pairs in
    the JSONL file `pairs` by the Bradley-Terry likelihood, starting from the weights in folder
    `model` (a causal language model, whose head is replaced, or a reward model), and save it to
    the new folder `output`. Raises ValueError for unusable input."""
    settings = settings or SupervisedSettings()
    tokenizer = load_tokenizer(model)
    pad = _pad_id(tokenizer, model)
    torch.manual_seed(settings.seed)  # the new head is drawn here
    network = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32, pad_token_id=pad
    )

    def encode(row: Row, where: str) -> list[Encoded]:
        sides = ("chosen", "rejected")
        return [encode_row(tokenizer, row, side, where, settings.max_length) for side in sides]

    def loss(network: PreTrainedModel, batch: list[list[Encoded]]) -> tuple[torch.Tensor, float]:
        return preference_loss(network, batch, pad, settings.center)

    result = _train(
        network, tokenizer, Path(pairs), Path(output), settings, encode, loss, on_progress
    )
    return result


def response_loss(network: PreTrainedModel, batch: Sequence[Encoded], pad: int) -> torch.Tensor:
    """Mean negative log-likelihood of the batch's response tokens."""
    tokens, mask = pad_right([row.tokens for row in batch], pad)
    logits = network(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, :-1]
    positions = torch.arange(1, tokens.shape[1])[None, :]
    starts = torch.tensor([row.prompt_tokens for row in batch])[:, None]
    wanted = (positions >= starts) & mask[:, 1:].bool()
    return functional.cross_entropy(logits[wanted], tokens[:, 1:][wanted])


def preference_loss(
    network: PreTrainedModel, batch: Sequence[Sequence[Encoded]], pad: int, center: float
) -> tuple[torch.Tensor, float]:
    """Bradley-Terry loss of (chosen, rejected) rows, and the share ordered correctly."""
    tokens, mask = pad_right(
        [side.tokens for sides in zip(*batch, strict=True) for side in sides], pad
    )
    scores = network(input_ids=tokens, attention_mask=mask, use_cache=False).logits[:, 0]
    chosen, rejected = scores.chunk(2)
    loss = -functional.logsigmoid(chosen - rejected).mean()
    loss = loss + center * (chosen + rejected).square().mean()
    return loss, (chosen > rejected).float().mean().item()


def pad_right(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, attention mask), both [rows, longest row]."""
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    return tokens, mask


def load_tokenizer(model: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder `model`."""
    if not (Path(model) / "config.json").is_file():
        raise ValueError(f"{model}: no config.json here; give a Hugging Face model folder")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model)
    return tokenizer


def encode_row(
    tokenizer: PreTrainedTokenizerBase, row: Row, key: str, where: str, max_length: int
) -> Encoded:
    """`row`'s prompt and the response under `key` as token ids, cut at `max_length`. A cut
    response has no end-of-sequence token, as in generation."""
    prompt, response = row.get("prompt"), row.get(key)
    if not isinstance(prompt, str | list) or not prompt:
        raise ValueError(f"{where}: 'prompt' must be text or a list of chat messages")
    if not isinstance(response, str):
        raise ValueError(f"{where}: {key!r} must be text")
    if isinstance(prompt, list):
        if tokenizer.chat_template is None:
            raise ValueError(f"{where}: a chat prompt, but the tokenizer has no chat template")
        prompt_text = tokenizer.apply_chat_template(
            prompt, tokenize=False, add_generation_prompt=True
        )
        head = tokenizer(prompt_text, add_special_tokens=False)["input_ids"]
    else:
        head = tokenizer(prompt)["input_ids"]
    if len(head) >= max_length:
        raise ValueError(f"{where}: prompt of {len(head)} tokens; max_length is {max_length}")
    tail = tokenizer(response, add_special_tokens=False)["input_ids"]
    ids = [*head, *tail, tokenizer.eos_token_id][:max_length]
    return Encoded(tuple(ids), len(head))


def read_rows(path: Path) -> list[tuple[str, Row]]:
    """(file and line, row) for each row of a JSONL file."""
    found: list[tuple[str, Row]] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: not JSON ({error.msg}); one object a line") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where}: expected an object, found {type(row).__name__}")
            found.append((where, row))
    if not found:
        raise ValueError(f"{path}: no rows")
    return found


def make_batches(sizes: Sequence[int], batch_tokens: int, rng: random.Random) -> list[list[int]]:
    """Cut rows of the given sizes (tokens) into batches of at most `batch_tokens` padded tokens,
    one row at least: shuffled, rows of like size together, batches in random order."""
    order = list(range(len(sizes)))
    rng.shuffle(order)
    order.sort(key=lambda i: sizes[i])  # stable: equal sizes stay shuffled
    batches: list[list[int]] = []
    for i in order:
        if batches and (len(batches[-1]) + 1) * sizes[i] <= batch_tokens:
            batches[-1].append(i)
        else:
            batches.append([i])
    rng.shuffle(batches)
    return batches


def learning_rate_at(step: int, num_steps: int, settings: SupervisedSettings) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    warmup = max(1, round(settings.warmup_fraction * num_steps))
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, num_steps - warmup)
    return settings.learning_rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def _train(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    output: Path,
    settings: SupervisedSettings,
    encode: Encoder,
    batch_loss: BatchLoss,
    on_progress: OnProgress | None,
) -> SupervisedResult:
    if output.exists():
        raise ValueError(f"{output}: exists already; remove it or give another output folder")
    started = time.monotonic()
    rng = random.Random(settings.seed)
    torch.manual_seed(settings.seed)
    rows = [encode(row, where) for where, row in read_rows(path)]
    rng.shuffle(rows)
    num_held_out = int(settings.held_out_fraction * len(rows))
    held_out, rows = rows[:num_held_out], rows[num_held_out:]
    batches = _plan_batches(rows, settings, rng)
    optimizer = torch.optim.AdamW(
        network.parameters(), betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    network.train()
    losses: list[float] = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, len(batches), settings)
        loss, _ = batch_loss(network, [rows[i] for i in batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"step {step + 1}: the loss is {losses[-1]}; lower the learning rate")
        if on_progress is not None:
            on_progress(Progress(step + 1, len(batches), losses[-1]))
    held_out_loss, accuracy = _evaluate(network, held_out, settings, batch_loss)
    _save(network, tokenizer, output)
    num_tokens = sum(len(side.tokens) for batch in batches for i in batch for side in rows[i])
    logger.info("%s: %d steps, %d tokens", output, len(batches), num_tokens)
    return SupervisedResult(
        tuple(losses),
        num_tokens,
        time.monotonic() - started,
        num_held_out,
        held_out_loss,
        accuracy,
    )


def _size(row: list[Encoded]) -> int:
    return len(row) * max(len(side.tokens) for side in row)


def _plan_batches(
    rows: list[list[Encoded]], settings: SupervisedSettings, rng: random.Random
) -> list[list[int]]:
    """Batches of every epoch, in order; a fractional last epoch keeps that share of its batches."""
    batches: list[list[int]] = []
    for epoch in range(math.ceil(settings.epochs)):
        cut = make_batches([_size(row) for row in rows], settings.batch_tokens, rng)
        share = min(1.0, settings.epochs - epoch)
        batches += cut[: max(1, round(share * len(cut)))]
    return batches


@torch.no_grad()
def _evaluate(
    network: PreTrainedModel,
    rows: list[list[Encoded]],
    settings: SupervisedSettings,
    batch_loss: BatchLoss,
) -> tuple[float | None, float | None]:
    """(loss, accuracy), both a mean over batches weighted by rows; None without rows."""
    if not rows:
        return None, None
    network.eval()
    total_loss = total_accuracy = 0.0
    cut = make_batches([_size(r) for r in rows], settings.batch_tokens, random.Random(0))
    for batch in cut:
        loss, accuracy = batch_loss(network, [rows[i] for i in batch])
        total_loss += loss.item() * len(batch)
        total_accuracy += accuracy * len(batch)
    has_pairs = len(rows[0]) > 1
    return total_loss / len(rows), total_accuracy / len(rows) if has_pairs else None


def _pad_id(tokenizer: PreTrainedTokenizerBase, model: str | Path) -> int:
    """The padding token's id; a reward model finds the last real token by it, so it must differ
    from the end-of-sequence token."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"{model}: the tokenizer needs a padding token of its own (pad_token)")
    return int(tokenizer.pad_token_id)


def _save(network: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: Path) -> None:
    """Write aside and rename: `output` is whole or absent."""
    aside = output.with_name(output.name + ".writing")
    shutil.rmtree(aside, ignore_errors=True)
    network.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    aside.rename(output)
