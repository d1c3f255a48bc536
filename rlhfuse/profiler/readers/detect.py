"""Which format files have, by their content, never by their names."""

import gzip
import zlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

from rlhfuse.profiler.readers.chrome_events import FieldNames, open_chrome_events
from rlhfuse.profiler.readers.kineto import open_kineto
from rlhfuse.profiler.readers.nsys import open_nsys
from rlhfuse.profiler.readers.ours import open_files, open_run
from rlhfuse.profiler.readers.primus import open_primus
from rlhfuse.profiler.readers.rollouts import holds_rollouts, open_rollouts
from rlhfuse.profiler.readers.schedule_text import (
    is_flexfusion,
    is_torch_csv,
    open_flexfusion,
    open_torch_csv,
)
from rlhfuse.profiler.readers.step_metrics import holds_step_metrics, open_step_metrics
from rlhfuse.profiler.readers.stream import OnProgress
from rlhfuse.profiler.readers.tensorboard import is_event_file, open_tensorboard
from rlhfuse.profiler.readers.timed_rollouts import open_timed_rollouts
from rlhfuse.profiler.trace import Trace

_HEAD = 1 << 16
_OURS = b'{"traceEvents":[{"ph":"M","name":"process_name","pid":0'
_KINETO = (
    b'"schemaVersion"',
    b'"deviceProperties"',
    b'"distributedInfo"',
    b'"cpu_op"',
    b'"kernel"',
    b'"cuda_runtime"',
)
_ENDINGS = (
    *(".json", ".json.gz", ".jsonl", ".log", ".txt", ".out"),
    *(".sqlite", ".csv", ".csv.gz", ".trace"),
)
_SKIPPED = ("config.json", "environment.json", "report.html")


class Format(StrEnum):
    """What a single file can be."""

    OURS = "rlhfuse timeline"
    PRIMUS = "primus"
    KINETO = "kineto"
    CHROME = "chrome events"
    STEP_METRICS = "step metrics"
    NSYS = "nsys"
    FLEXFUSION = "flexfusion"
    TORCH_CSV = "torch schedule"
    TENSORBOARD = "tensorboard"
    ROLLOUTS = "rollout dump"


def open_trace(
    paths: Sequence[Path],
    names: FieldNames | None = None,
    on_progress: OnProgress | None = None,
) -> Trace:
    """The trace in these files and folders.

    Args:
        names: where Chrome event lists of other makers keep step, micro-batch and stage.
        on_progress: called with the share of a large trace that is read.

    Raises:
        ValueError: nothing there can be read, or files are of different formats.
    """
    if len(paths) == 1 and _is_run(paths[0]):
        return open_run(paths[0])
    files = [file for path in paths for file in _files(path)]
    if not files:
        raise ValueError(f"{_names(paths)}: no files to profile there")
    kinds = {file: sniff(file) for file in files}
    known = sorted({kind for kind in kinds.values() if kind is not None})
    if not known:
        raise ValueError(
            f"{_names(paths)}: no trace of a known format (rlhfuse runs and timelines, PyTorch "
            "profiler JSON, Chrome event lists, Primus pp_rank JSON, nsys SQLite exports, "
            "FlexFusion text, torch schedule CSV, TensorBoard files, rollout dumps, or step "
            "metrics with timing_s/)"
        )
    timed = [kind for kind in known if kind in (Format.STEP_METRICS, Format.TENSORBOARD)]
    if len(timed) == 1 and set(known) == {timed[0], Format.ROLLOUTS}:
        by_kind = {kind: [file for file in files if kinds[file] is kind] for kind in known}
        opener = open_step_metrics if timed[0] is Format.STEP_METRICS else open_tensorboard
        return open_timed_rollouts(opener(by_kind[timed[0]]), by_kind[Format.ROLLOUTS])
    if len(known) > 1:
        raise ValueError(f"{_names(paths)}: files of different formats ({', '.join(known)})")
    mine = [file for file, kind in kinds.items() if kind is known[0]]
    openers: dict[Format, Callable[[list[Path]], Trace]] = {
        Format.OURS: open_files,
        Format.PRIMUS: open_primus,
        Format.KINETO: lambda files: open_kineto(files, on_progress),
        Format.CHROME: lambda files: open_chrome_events(files, names),
        Format.STEP_METRICS: open_step_metrics,
        Format.NSYS: open_nsys,
        Format.FLEXFUSION: open_flexfusion,
        Format.TORCH_CSV: open_torch_csv,
        Format.TENSORBOARD: open_tensorboard,
        Format.ROLLOUTS: open_rollouts,
    }
    return openers[known[0]](mine)


def sniff(path: Path) -> Format | None:
    """The format of one file, from its first 64 KiB."""
    head = read_head(path)
    if head.startswith(b"SQLite format 3\0"):
        return Format.NSYS
    if is_event_file(head):
        return Format.TENSORBOARD
    if b'"traceEvents"' in head:
        if head.startswith(_OURS):
            return Format.OURS
        return Format.KINETO if any(mark in head for mark in _KINETO) else Format.CHROME
    if b'"fwd_start"' in head and b'"bwd_end"' in head:
        return Format.PRIMUS
    if holds_step_metrics(head):
        return Format.STEP_METRICS
    if holds_rollouts(head):
        return Format.ROLLOUTS
    return _schedule_text(head)


def _schedule_text(head: bytes) -> Format | None:
    if is_flexfusion(head):
        return Format.FLEXFUSION
    return Format.TORCH_CSV if is_torch_csv(head) else None


def read_head(path: Path) -> bytes:
    """The first bytes of a file, unpacked where it is gzipped.

    Raises:
        ValueError: the file cannot be read or is broken from its start.
    """
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if not packed:
            with path.open("rb") as file:
                return file.read(_HEAD)
        with gzip.open(path) as file:
            return file.read(_HEAD)
    except EOFError:
        raise ValueError(f"{path}: the gzip file is cut short") from None
    except (OSError, zlib.error) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error


def _is_run(path: Path) -> bool:
    """A run's folder; before its first step is done, only its metrics and its configuration."""
    begun = (path / "metrics.jsonl").is_file() and (path / "environment.json").is_file()
    return path.is_dir() and ((path / "timeline").is_dir() or begun)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: no such file or folder")
    inside = sorted(file for file in path.iterdir() if file.is_file())
    return [
        file
        for file in inside
        if (file.name.endswith(_ENDINGS) or "tfevents" in file.name) and file.name not in _SKIPPED
    ]


def _names(paths: Sequence[Path]) -> str:
    return ", ".join(str(path) for path in paths)
