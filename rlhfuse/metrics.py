"""Where a step's numbers go: console, JSONL, TensorBoard, Weights & Biases.

Every logger takes the same flat dict of the field's metric names. JSON has no NaN or infinity:
they are written as null.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol

import msgspec

from rlhfuse.progress import Progress

METRICS_FILE = "metrics.jsonl"
Values = Mapping[str, float]


class MetricLogger(Protocol):
    """Takes the numbers of one step."""

    def log(self, step: int, metrics: Values) -> None: ...

    def rewind(self, step: int) -> None:
        """Later steps will run, and be logged, again."""

    def close(self) -> None: ...


class Loggers:
    """Several loggers as one; use it as a context manager."""

    def __init__(self, members: Sequence[MetricLogger]) -> None:
        self._members = tuple(members)

    def log(self, step: int, metrics: Values) -> None:
        """Give `metrics` of `step` (counted from 1) to every logger."""
        for member in self._members:
            member.log(step, metrics)

    def rewind(self, step: int) -> None:
        """Steps after `step` will run again: forget them where that is possible."""
        for member in self._members:
            member.rewind(step)

    def close(self) -> None:
        for member in self._members:
            member.close()

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def open_loggers(
    names: Sequence[str],
    folder: Path,
    *,
    progress: Progress,
    project: str,
    experiment: str,
    resume_step: int | None = None,
    config: Mapping[str, object] | None = None,
) -> Loggers:
    """Open the loggers that `trainer.logger` names.

    Args:
        names: of ``console jsonl tensorboard wandb``.
        folder: the run folder.
        progress: shows finished steps when ``console`` is named.
        resume_step: the last step that is kept of an earlier run; None starts anew, and steps
            of an earlier run in `folder` are dropped.
        config: shown by Weights & Biases next to the run.

    Raises:
        ValueError: a name is unknown, or what it needs is not installed.
    """
    keep = 0 if resume_step is None else resume_step
    members: list[MetricLogger] = []
    for name in dict.fromkeys(names):
        match name:
            case "console":
                members.append(ConsoleLogger(progress))
            case "jsonl":
                members.append(JsonlLogger(folder / METRICS_FILE, keep))
            case "tensorboard":
                members.append(TensorBoardLogger(folder / "tensorboard", keep))
            case "wandb":
                members.append(WandbLogger(folder, project, experiment, config or {}))
            case _:
                raise ValueError(
                    f"trainer.logger: unknown logger {name!r} "
                    "(known: console, jsonl, tensorboard, wandb)"
                )
    return Loggers(members)


class ConsoleLogger:
    """One line a step, through the progress display."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def log(self, step: int, metrics: Values) -> None:
        self._progress.step_finished(step, metrics)

    def rewind(self, step: int) -> None:
        pass

    def close(self) -> None:
        pass


class JsonlLogger:
    """One JSON object a step: ``{"step": N, "<metric>": value, ...}``, flushed at once."""

    def __init__(self, path: Path, keep_steps: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        cut_jsonl(path, keep_steps)
        self._file = path.open("ab")

    def log(self, step: int, metrics: Values) -> None:
        self._file.write(msgspec.json.encode({"step": step, **metrics}) + b"\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        self._file.close()
        cut_jsonl(self._path, step)
        self._file = self._path.open("ab")

    def close(self) -> None:
        self._file.close()


def cut_jsonl(path: Path, last_step: int) -> None:
    """Drop the rows after `last_step` from a JSONL file whose rows have a ``step``.

    A last row that a crash cut short goes too. The file is replaced as a whole or not at all.
    """
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if 0 <= _step_of(line) <= last_step]
    if kept == lines:
        return
    logging.getLogger(__name__).info("%s: %d rows cut", path, len(lines) - len(kept))
    aside = path.with_name(path.name + ".part")
    aside.write_bytes(b"".join(kept))
    os.replace(aside, path)


class _Row(msgspec.Struct):
    step: int


def _step_of(line: bytes) -> int:
    try:
        return msgspec.json.decode(line, type=_Row).step if line.endswith(b"\n") else -1
    except msgspec.DecodeError:
        return -1


class TensorBoardLogger:
    """Scalars in TensorBoard event files."""

    def __init__(self, folder: Path, keep_steps: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError(
                "trainer.logger: tensorboard is not installed "
                "(pip install tensorboard, or take it out of trainer.logger)"
            ) from error
        self._folder = folder
        # TensorBoard hides what an interrupted run wrote at purge_step and after.
        self._writer = SummaryWriter(str(folder), purge_step=keep_steps + 1)

    def log(self, step: int, metrics: Values) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def rewind(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer.close()
        self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """Weights & Biases; the run's name makes it resumable."""

    def __init__(
        self, folder: Path, project: str, experiment: str, config: Mapping[str, object]
    ) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                "trainer.logger: wandb is not installed "
                "(pip install 'rlhfuse[wandb]', or take it out of trainer.logger)"
            ) from error
        self._run = wandb.init(
            project=project, name=experiment, dir=str(folder), config=dict(config), resume="allow"
        )

    def log(self, step: int, metrics: Values) -> None:
        self._run.log(dict(metrics), step=step)

    def rewind(self, step: int) -> None:
        pass  # it takes each step once, and the same numbers come again

    def close(self) -> None:
        self._run.finish()
