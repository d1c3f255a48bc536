"""Measurements that take several calls: what each repetition gave is kept beside the result."""

import json
from collections.abc import Sequence

from bench.record import Row, write_result
from bench.results_page import RESULTS


def kept(name: str) -> list[Row]:
    """Rows of the repetitions so far; each says which `repetition` it is of."""
    path = RESULTS / f"{name}_repetitions.json"
    if not path.exists():
        return []
    rows: list[Row] = json.loads(path.read_text())["rows"]
    return rows


def keep(name: str, rows: Sequence[Row]) -> None:
    """All rows so far, in place of those on disk."""
    write_result(f"{name}_repetitions", rows)


def first_free(rows: Sequence[Row]) -> int:
    """The number of the next repetition."""
    return 1 + max((int(row["repetition"]) for row in rows), default=-1)
