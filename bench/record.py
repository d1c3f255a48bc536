"""How results are kept: JSON with hardware, commit, command and time, below bench/results/, where
a page shows them all."""

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from bench.results_page import RESULTS, write_page
from rlhfuse.run_folder import environment

Row = Mapping[str, float | int | str]


def write_result(name: str, rows: Sequence[Row]) -> Path:
    """Write ``results/<name>.json`` and return its path."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {
        "name": name,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "command": " ".join(["python", "-m", f"bench.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "environment": environment(),
        "rows": [dict(row) for row in rows],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    write_page()
    return path


def print_table(rows: Sequence[Row]) -> None:
    """A table of each run of rows with the same keys."""
    for keys, alike in groupby(rows, key=list):
        cells = [[_cell(row[key]) for key in keys] for row in alike]
        widths = [max(len(key), *(len(c[i]) for c in cells)) for i, key in enumerate(keys)]
        print("  ".join(key.rjust(w) for key, w in zip(keys, widths, strict=True)))
        for line in cells:
            print("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)))


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, least, greatest."""
    return statistics.median(values), min(values), max(values)


def _cell(value: float | int | str) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)
