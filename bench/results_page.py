"""Every result as tables that people can read, with its command: `bench/results/README.md`.

    python -m bench.results_page

Made from the JSON files alone; a test holds the page to them.
"""

import ast
import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PAGE = RESULTS / "README.md"
MOST_ROWS = 40  # of one table; what is longer stays in its file
Cell = float | int | str | bool | None
Row = dict[str, Cell]

HEAD = """# Results

Made by `python -m bench.results_page` from the files beside it, which also hold the hardware, the
versions and the time of each run. Machine, unless a file says otherwise: two shared cores of an
AMD EPYC, no GPU, one thread per rank; what is said in seconds moves by a third with what its
neighbours do, ratios were taken side by side in one run. Simulations and searches say so in their
question. A figure is what that commit did: the newest may do better.
"""


def write_page() -> None:
    """Bring the page up to date with the files."""
    PAGE.write_text(page(RESULTS))


def page(folder: Path) -> str:
    """The text for the results in `folder`, by name."""
    files = [path for path in sorted(folder.glob("*.json")) if not _is_raw(path)]
    return "\n".join([HEAD, *(_section(path) for path in files)])


def _is_raw(path: Path) -> bool:
    """Single repetitions, whose medians are another file's."""
    return path.stem.endswith("_repetitions")


def _section(path: Path) -> str:
    record = json.loads(path.read_text())
    command = str(record.get("command", ""))
    lines = [f"## {path.stem}", ""]
    question = _question(command)
    if question:
        lines += [question, ""]
    commit = record.get("commit")
    if command:
        lines += [f"`{command}`" + (f" at commit {commit}" if commit else ""), ""]
    rows: list[Row] = record.get("rows") or record.get("kernels") or []
    for _, alike in groupby(rows, key=list):
        lines += [*_table(list(alike)), ""]
    return "\n".join(lines)


def _question(command: str) -> str:
    """The first sentence of the benchmark's own description."""
    found = re.search(r"bench[./](\w+)", command)
    if not found:
        return ""
    module = ast.parse((Path(__file__).parent / f"{found[1]}.py").read_text())
    text = " ".join((ast.get_docstring(module) or "").split("\n\n")[0].split())
    return text.rstrip(":") if text.endswith(("?", ".", ":")) else f"{text}."


def _table(rows: list[Row]) -> Iterator[str]:
    if len(rows) > MOST_ROWS:
        yield f"{len(rows)} rows of {', '.join(rows[0])}: in the file."
        return
    keys = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    yield "| " + " | ".join(keys) + " |"
    yield "|" + "---|" * len(keys)
    for row in rows:
        yield "| " + " | ".join(_cell(row[key]) for key in keys) + " |"


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    write_page()
    print(PAGE)
