"""Recorded response lengths from a file: a run's samples, a table, or plain numbers."""

import csv
import json
from pathlib import Path

NAMES = ("response_length", "response_tokens", "length", "tokens")


def read_lengths(path: Path) -> list[int]:
    """JSONL (objects with one of `NAMES`, or numbers), CSV with such a column, or one number a
    line.

    Raises:
        ValueError: the file cannot be read, or a line is not understood.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise ValueError(f"plan.lengths_file: {path}: {error.strerror}") from error
    if not lines:
        raise ValueError(f"plan.lengths_file: {path} holds no lengths")
    if path.suffix == ".csv" or (path.suffix != ".jsonl" and "," in lines[0]):
        return _from_csv(path, lines)
    return [_from_line(path, number, line) for number, line in enumerate(lines, 1)]


def _from_csv(path: Path, lines: list[str]) -> list[int]:
    rows = list(csv.DictReader(lines))
    column = next((name for name in NAMES if rows and name in rows[0]), None)
    if column is None:
        raise ValueError(f"plan.lengths_file: {path} has no column {' or '.join(NAMES)}")
    return [_positive(path, number, row[column]) for number, row in enumerate(rows, 2)]


def _from_line(path: Path, number: int, line: str) -> int:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise ValueError(f"plan.lengths_file: {path}, line {number}: {error}") from error
    if isinstance(value, dict):
        value = next((value[name] for name in NAMES if name in value), None)
    return _positive(path, number, value)


def _positive(path: Path, number: int, value: object) -> int:
    try:
        length = int(str(value))
    except ValueError:
        length = 0
    if length < 1:
        raise ValueError(
            f"plan.lengths_file: {path}, line {number}: {value!r} is no number of tokens"
        )
    return length
