"""``rlhfuse import verl``: another framework's configuration becomes ours."""

from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import click

from rlhfuse.cli.common import emit_json, user_errors
from rlhfuse.config_file import dump, parse_yaml, read_yaml, split_overrides
from rlhfuse.importers.verl import Entry, Imported, flatten, import_verl

_MEANING = {
    "mapped": "have a counterpart here",
    "neutral": "switch off, or detail, what is not used",
    "runs_only": "say how verl runs, not what it computes",
    "unmapped": "have no counterpart: look whether you rely on them",
    "unsafe": "CHANGE WHAT IS COMPUTED, and are not available here",
}


@click.group("import")
def import_config() -> None:
    """Turn another framework's configuration into ours."""


@import_config.command("verl", context_settings={"ignore_unknown_options": True})
@click.argument("items", nargs=-1, required=True, metavar="FILE_OR_OVERRIDE...")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verl(items: tuple[str, ...], output: Path | None, as_json: bool) -> None:
    """Read verl's YAML files and key=value overrides, later ones counting more; write ours."""
    with user_errors():
        imported = import_verl(_given(items))
        text = dump(imported.config)
        if output is not None:
            output.write_text(text, encoding="utf-8")
    if as_json:
        emit_json(
            {
                "config": imported.config,
                "entries": imported.entries,
                "todo": imported.todo,
                "output": None if output is None else str(output),
            }
        )
        return
    if output is None:
        click.echo(text)
    # The table goes to stderr where stdout carries the configuration.
    for line in _table(imported):
        click.echo(line, err=output is None)
    if output is not None:
        click.echo(f"written: {output}")


def _given(items: Sequence[str]) -> dict[str, object]:
    given: dict[str, object] = {}
    overrides = []
    for item in items:
        if item.endswith((".yaml", ".yml", ".json")) and "=" not in item:
            given.update(flatten(read_yaml(item)))
        else:
            overrides.append(item)
    for key, text in split_overrides(overrides):
        value = parse_yaml(text, f"override {key}")
        # A section given as a whole replaces what was said below it.
        for old in [old for old in given if old.startswith(key + ".")]:
            del given[old]
        given.update(flatten({key: value}))
    return given


def _table(imported: Imported) -> list[str]:
    lines = []
    counts = Counter(entry.status for entry in imported.entries)
    for status, meaning in _MEANING.items():
        chosen = [entry for entry in imported.entries if entry.status == status]
        if not chosen:
            continue
        lines += ["", f"{counts[chosen[0].status]} keys {meaning} ({status}):"]
        if status in ("neutral", "runs_only"):
            sections = groupby(sorted(entry.key for entry in chosen), key=_section)
            lines += [f"  {name}: {_names(name, list(keys))}" for name, keys in sections]
        else:
            width = min(max(len(_left(entry)) for entry in chosen), 72)
            lines += [f"  {_left(entry):<{width}}  {_right(entry)}" for entry in chosen]
    if imported.todo:
        lines += ["", "to do before training:", *(f"  {line}" for line in imported.todo)]
    return lines


def _section(key: str) -> str:
    return ".".join(key.split(".")[:2]) if key.count(".") > 1 else key.split(".")[0]


def _names(section: str, keys: Sequence[str]) -> str:
    return ", ".join(key.removeprefix(section + ".") for key in keys)


def _left(entry: Entry) -> str:
    return f"{entry.key}={entry.value!s:.48}"


def _right(entry: Entry) -> str:
    return f"-> {entry.target}={entry.becomes}" if entry.target else entry.note
