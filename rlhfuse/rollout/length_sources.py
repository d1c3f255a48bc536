"""Where response lengths come from: distributions, or lengths recorded by a run or in a file."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

COLUMNS = ("response_tokens", "response_length", "length", "tokens")


def lognormal(median: float, sigma: float, num: int, limit: int, seed: int = 0) -> list[int]:
    """`num` lengths whose logarithms are normal, cut off at `limit`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), sigma, num)
    return _whole(drawn, limit)


def weibull(scale: float, shape: float, num: int, limit: int, seed: int = 0) -> list[int]:
    """`num` lengths with a Weibull distribution; a shape below 1 has a heavy tail."""
    return _whole(scale * np.random.default_rng(seed).weibull(shape, num), limit)


def empirical(recorded: Sequence[int], num: int, limit: int, seed: int = 0) -> list[int]:
    """`num` of the recorded lengths, drawn with replacement.

    Raises:
        ValueError: nothing was recorded.
    """
    if not recorded:
        raise ValueError("lengths: none were recorded to draw from")
    drawn = np.random.default_rng(seed).choice(np.asarray(recorded, dtype=np.float64), num)
    return _whole(drawn, limit)


def read_lengths(path: Path) -> list[int]:
    """Response lengths, one a sample, from a CSV file with a header or a JSONL file.

    The column (or key) is the first there is of `COLUMNS`; a JSONL line may also be a number, or
    hold a list of lengths (one line a step), as run folders do.

    Raises:
        ValueError: the file cannot be read so; says in which line and why.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    lengths = _from_csv(path, text) if path.suffix == ".csv" else _from_jsonl(path, text)
    if not lengths:
        raise ValueError(f"{path}: holds no lengths")
    return lengths


def _from_csv(path: Path, text: str) -> list[int]:
    rows = csv.DictReader(text.splitlines())
    name = next((c for c in COLUMNS if c in (rows.fieldnames or ())), None)
    if name is None:
        raise ValueError(f"{path}: has none of the columns {', '.join(COLUMNS)}")
    return [_length(row[name], path, number) for number, row in enumerate(rows, 2)]


def _from_jsonl(path: Path, text: str) -> list[int]:
    lengths: list[int] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        if isinstance(value, dict):
            name = next((c for c in (*COLUMNS, "lengths") if c in value), None)
            if name is None:
                raise ValueError(f"{path}, line {number}: has none of {', '.join(COLUMNS)}")
            value = value[name]
        many = value if isinstance(value, list) else [value]
        lengths += [_length(each, path, number) for each in many]
    return lengths


def _length(value: object, path: Path, line: int) -> int:
    try:
        length = int(float(str(value)))
    except (ValueError, OverflowError):
        length = 0
    if length < 1:
        raise ValueError(f"{path}, line {line}: {value!r} is not a length in tokens")
    return length


def _whole(drawn: "np.ndarray[tuple[int], np.dtype[np.float64]]", limit: int) -> list[int]:
    return [int(n) for n in np.clip(np.rint(drawn), 1, limit)]
