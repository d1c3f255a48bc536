"""What a run folder holds, as far as it can be read. What is missing or broken becomes a notice.

Files: ``config.yaml``, ``metrics.jsonl``, ``timeline/step_N.json``, ``samples.jsonl``,
``lengths.jsonl``, ``environment.json``, ``verify.json``. All are optional here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from rlhfuse.timeline import Timeline, load_chrome

_TIMELINE_NAME = re.compile(r"step_(\d+)\.json(\.gz)?")
_Row = TypeVar("_Row", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class StepValues:
    """The numbers of one step in ``metrics.jsonl``; step 0 is before the training."""

    step: int
    values: Mapping[str, float]

    @property
    def trained(self) -> bool:
        """Whether there was a training step, not only a validation."""
        return any(not name.startswith("val-") for name in self.values)

    @property
    def serial(self) -> bool:
        """Whether this step ran without fusion, to be compared (`fusion.audit_every`)."""
        audited = "fusion/measured_speedup" in self.values
        return self.values.get("fusion/serial", float(audited)) > 0


class SampleRow(msgspec.Struct, frozen=True):
    """One row of ``samples.jsonl``. `set` is the validation set's name."""

    step: int
    prompt: str
    response: str
    set: str = ""
    score: float | None = None


class LengthsRow(msgspec.Struct, frozen=True):
    """One row of ``lengths.jsonl``: the response lengths (tokens) of one step."""

    step: int
    lengths: tuple[int, ...]


class Verification(msgspec.Struct, frozen=True):
    """``verify.json``: the summary of ``rlhfuse verify``."""

    steps: int
    tokens_equal: bool
    rewards_equal: bool
    weights_equal: bool
    serial_s: float
    fused_s: float
    speedup: float
    first_difference: str | None = None


@dataclass(frozen=True)
class RunFolder:
    """Everything that the report shows, read from a run folder."""

    title: str
    config: str = ""
    steps: tuple[StepValues, ...] = ()
    timeline_files: Mapping[int, Path] = field(default_factory=dict)
    samples: tuple[SampleRow, ...] = ()
    lengths: tuple[LengthsRow, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    verification: Verification | None = None
    notices: tuple[str, ...] = ()

    def series(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of one metric, where it was logged."""
        return [(row.step, row.values[name]) for row in self.steps if name in row.values]


def read_run(folder: Path) -> RunFolder:
    """Read a run folder.

    Raises:
        ValueError: `folder` is not a folder.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such run folder")
    notices: list[str] = []
    resolved = folder.resolve()
    steps = _read_steps(folder / "metrics.jsonl", notices)
    return RunFolder(
        title=f"{resolved.parent.name} / {resolved.name}",
        config=_read_text(folder / "config.yaml", notices),
        steps=steps,
        timeline_files=_timeline_files(folder / "timeline", notices),
        samples=_read_rows(folder / "samples.jsonl", SampleRow, notices),
        lengths=_read_rows(folder / "lengths.jsonl", LengthsRow, notices, optional=True),
        environment=_read_environment(folder / "environment.json", notices),
        verification=_read_verification(folder / "verify.json", notices),
        notices=tuple(notices),
    )


def read_timeline(path: Path) -> Timeline | str:
    """The timeline, or why it cannot be shown."""
    try:
        timeline = load_chrome(path)
    except ValueError:
        return f"{path.name} could not be read as a timeline."
    return timeline if timeline.spans else f"{path.name} holds no spans."


def _read_text(path: Path, notices: list[str]) -> str:
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        notices.append(f"{path.name} is missing.")
    except OSError as error:
        notices.append(f"{path.name} cannot be read: {error.strerror}.")
    return ""


class _StepRow(msgspec.Struct):
    step: int


def _read_steps(path: Path, notices: list[str]) -> tuple[StepValues, ...]:
    found: dict[int, dict[str, float]] = {}
    for line in _lines(path, notices):
        try:
            step = msgspec.json.decode(line, type=_StepRow).step
            values = msgspec.json.decode(line, type=dict[str, object])
        except msgspec.DecodeError:
            notices.append(f"{path.name}: a row could not be read and is left out.")
            continue
        numbers = {k: float(v) for k, v in values.items() if isinstance(v, int | float)}
        numbers.pop("step", None)
        found.setdefault(step, {}).update(numbers)  # a validation has a row of its own
    return tuple(StepValues(step, found[step]) for step in sorted(found))


def _lines(path: Path, notices: list[str], optional: bool = False) -> Sequence[bytes]:
    try:
        return [line for line in path.read_bytes().splitlines() if line.strip()]
    except FileNotFoundError:
        if not optional:
            notices.append(f"{path.name} is missing.")
    except OSError as error:
        notices.append(f"{path.name} cannot be read: {error.strerror}.")
    return []


def _read_rows(
    path: Path, kind: type[_Row], notices: list[str], optional: bool = False
) -> tuple[_Row, ...]:
    rows, broken = [], 0
    for line in _lines(path, notices, optional):
        try:
            rows.append(msgspec.json.decode(line, type=kind))
        except msgspec.DecodeError:
            broken += 1
    if broken:
        notices.append(f"{path.name}: {broken} rows could not be read and are left out.")
    return tuple(rows)


def _timeline_files(folder: Path, notices: list[str]) -> dict[int, Path]:
    found = {}
    for path in sorted(folder.glob("step_*")) if folder.is_dir() else ():
        match = _TIMELINE_NAME.fullmatch(path.name)
        if match is not None:
            found[int(match[1])] = path
    if not found:
        notices.append("timeline/ holds no step: nothing to draw, and no idle time to explain.")
    return dict(sorted(found.items()))


def _read_environment(path: Path, notices: list[str]) -> tuple[tuple[str, str], ...]:
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except FileNotFoundError:
        notices.append(f"{path.name} is missing: hardware and versions are not known.")
        return ()
    except (OSError, msgspec.DecodeError):
        notices.append(f"{path.name} could not be read.")
        return ()
    return tuple(_flat("", entries))


def _flat(prefix: str, value: object) -> list[tuple[str, str]]:
    """Nested entries as (dotted name, text)."""
    if isinstance(value, dict):
        return [
            row
            for key, inner in value.items()
            for row in _flat(f"{prefix}.{key}" if prefix else str(key), inner)
        ]
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    return [(prefix, text)]


def _read_verification(path: Path, notices: list[str]) -> Verification | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Verification)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError):
        notices.append(f"{path.name} could not be read.")
        return None
