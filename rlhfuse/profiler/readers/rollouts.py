"""Rollout dumps: one row per sample. Their lengths say how long the tail of generation is.

verl (``rollout_data_dir``: N.jsonl a step), NeMo-RL (train_data_stepN.jsonl), slime and others.
There is no clock in them: time is counted in decode steps, which is what generation takes where
an engine's step time hardly depends on its batch. The range between that and a step time that is
proportional to the batch is the error bar.
"""

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from rlhfuse.profiler.arrays import Floats
from rlhfuse.profiler.readers.step_metrics import TAIL_SHARE
from rlhfuse.profiler.summary import WhatIf
from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import Kind, Span, Timeline

_LENGTHS = (
    *("response_length", "response_len", "response_lengths", "completion_length", "output_length"),
    *("num_response_tokens", "num_generated_tokens", "completion_tokens", "generation_length"),
    *("output_tokens", "response_tokens_count", "gen_len"),
)
_IDS = (
    *("response_ids", "response_token_ids", "output_ids", "output_token_ids", "completion_ids"),
    *("generation_logprobs", "rollout_log_probs", "response_mask"),
)
_TEXTS = ("output", "response", "completion", "generated_text", "answer")
_STEPS = ("step", "global_step", "training_step", "rollout_id", "iteration")
_CHARACTERS_A_TOKEN = 4.0
_DRAWS = 400
_FREE_SHARE = 0.5  # of the instances, whose samples the others take over
_SCORING = 0.15  # time of scoring all samples over generation's, where nothing tells it


def holds_rollouts(head: bytes) -> bool:
    """Whether a file's first line is a sample with a response."""
    line = head.split(b"\n", 1)[0].strip()
    if not line.startswith(b"{"):
        return False
    if not line.endswith(b"}"):  # a first row of more than the head
        return any(f'"{name}"'.encode() in head for name in (*_LENGTHS, *_IDS))
    row = _row(line)
    return row is not None and _length(row) is not None


def open_rollouts(paths: list[Path]) -> Trace:
    """Samples by step: what a row says, else the number in the file's name.

    Raises:
        ValueError: no row has a response.
    """
    lengths, guessed = lengths_by_step(paths)
    steps = tuple(sorted(lengths))

    def load(step: int | None) -> Loaded:
        return _load(lengths[steps[-1] if step is None else step], guessed)

    return Trace("rollout dump", steps, load)


def lengths_by_step(paths: list[Path]) -> tuple[dict[int, list[float]], bool]:
    """Tokens of every response, by step; and whether they had to be guessed from texts.

    Raises:
        ValueError: no row has a response.
    """
    lengths: dict[int, list[float]] = {}
    guessed = False
    for position, path in enumerate(paths):
        number = re.search(r"(\d+)\D*$", path.name.split(".json")[0])
        of_file = int(number[1][:15]) if number else position
        for row in _rows(path):
            found = _length(row)
            if found is None:
                continue
            length, exact = found
            guessed = guessed or not exact
            step = next((row[n] for n in _STEPS if isinstance(row.get(n), int)), of_file)
            assert isinstance(step, int)
            lengths.setdefault(step, []).append(length)
    if not lengths:
        raise ValueError(f"{paths[0]}: no sample with a response in it")
    return lengths, guessed


def _rows(path: Path) -> Iterator[Mapping[str, object]]:
    with path.open("rb") as file:
        for line in file:
            row = _row(line.strip())
            if row is not None:
                yield row


def _row(line: bytes) -> Mapping[str, object] | None:
    try:
        found = msgspec.json.decode(line, type=dict[str, object])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return found


def _length(row: Mapping[str, object]) -> tuple[float, bool] | None:
    """Tokens of a row's response, and whether they were counted and not guessed from its text."""
    for name in _LENGTHS:
        value = row.get(name)
        if isinstance(value, int | float) and 0 < value < 1e9:
            return float(value), True
    for name in _IDS:
        value = row.get(name)
        if isinstance(value, list) and value:
            return float(len(value)), True
    for name in _TEXTS:
        value = row.get(name)
        if isinstance(value, str) and value:
            return max(1.0, len(value) / _CHARACTERS_A_TOKEN), False
    return None


def _load(lengths: Sequence[float], guessed: bool) -> Loaded:
    """One lane that generates: as many samples as still run, in fifths."""
    ordered = np.sort(np.array(lengths))
    tail, low, high = tail_with_error(ordered)
    longest = float(ordered[-1])
    begin = longest * (1 - tail)
    spans = (
        Span("job", 0.0, begin, Kind.GENERATE, "generation"),
        Span("job", begin, longest, Kind.WAIT, "long tail", {"what": "long_tail"}),
    )
    told = [
        "no clock in a rollout dump: a second here is one decode step",
        f"{len(lengths)} samples, {ordered.mean():.0f} tokens on average, median "
        f"{np.median(ordered):.0f}, longest {longest:.0f}",
        f"long tail (under {TAIL_SHARE:.0%} of samples running): {tail:.0%} of generation "
        f"({low:.0%} to {high:.0%})",
    ]
    if guessed:
        told.append("lengths are guessed from characters, four a token")
    return Loaded(
        Timeline(spans), pipelines=False, warnings=tuple(told), what_if=_gains(ordered, longest)
    )


def tail_with_error(ordered: Floats) -> tuple[float, float, float]:
    """The tail's share of generation, and the range that 90 % of redrawn batches lie in."""
    rng = random.Random(0)
    drawn = [
        _tail(np.sort(np.array(rng.choices(ordered.tolist(), k=len(ordered)))))
        for _ in range(_DRAWS if len(ordered) <= 4096 else 40)
    ]
    drawn.sort()
    low, high = drawn[len(drawn) // 20], drawn[-1 - len(drawn) // 20]
    middle = _tail(ordered)
    return middle, min(low, middle), max(high, middle)


def _tail(ordered: Floats) -> float:
    """The share of decode steps in which under a fifth of the samples still run."""
    first = ordered[int(np.ceil((1 - TAIL_SHARE) * len(ordered))) - 1]
    return float(1 - first / ordered[-1])


def hidden_s(ordered: Floats, generation_s: float, scoring_s: float) -> tuple[float, float]:
    """Seconds of scoring that the tail hides, at least and at most: with step times of generation
    that do, and that do not, depend on the batch.

    Half of the instances are free in the tail; they score what is finished, at most all of it.
    """
    flat = _tail(ordered)
    steady = 1 - float(np.minimum(ordered, ordered[-1] * (1 - flat)).sum() / ordered.sum())
    both = [min(scoring_s, _FREE_SHARE * tail * generation_s) for tail in (steady, flat)]
    return min(both), max(both)


def _gains(ordered: Floats, longest: float) -> tuple[WhatIf, ...]:
    serial_s = longest * (1 + _SCORING)
    found = []
    for bound, saved in zip(
        ("at least", "at most"), hidden_s(ordered, longest, _SCORING * longest), strict=True
    ):
        name = f"scoring ({_SCORING:.0%} of generation) hidden in the tail ({bound})"
        found.append(WhatIf(name, serial_s - saved, saved / serial_s))
    return tuple(found)
