"""The folder of a run: what is written where, and checkpoints that are whole or not there.

``runs/<project>/<experiment>/``: ``config.yaml``, ``environment.json``, ``metrics.jsonl``,
``samples.jsonl``, ``lengths.jsonl``, ``workers.json`` (process ids), ``timeline/step_N.json``,
``report.html``, ``checkpoints/global_step_N/`` and
``checkpoints/latest_checkpointed_iteration.txt``;
``restart/step_N/``, a state newer than the last checkpoint from which the run restarts.
"""

import contextlib
import logging
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec
import psutil

from rlhfuse.config import TrainerConfig
from rlhfuse.data import StreamState
from rlhfuse.engines.vllm_setup import installed_version
from rlhfuse.placement import StagePlacement

logger = logging.getLogger(__name__)

_LATEST = "latest_checkpointed_iteration.txt"
_STATE = "trainer.json"
_MANIFEST = "manifest.json"


class TrainerState(msgspec.Struct, frozen=True, kw_only=True):
    """What the controller must remember to go on: written with every checkpoint."""

    step: int  # steps completed
    data: StreamState  # the place in the training prompts
    kl_coef: float
    pipelines: dict[str, StagePlacement]  # chosen once per run
    best_metric: str = ""
    best_value: float | None = None
    best_step: int = 0


class ValidationSample(msgspec.Struct, frozen=True):
    """A response of a validation set, for people to read."""

    step: int
    set: str
    prompt: str
    response: str
    score: float


class StepLengths(msgspec.Struct, frozen=True):
    """Tokens of every training sample of a step, in order of their ids: for the report, and for
    simulations of the step under other conditions."""

    step: int
    lengths: tuple[int, ...]  # responses
    prompts: tuple[int, ...]


class Manifest(msgspec.Struct, frozen=True):
    """Every file of a checkpoint with its size in bytes."""

    step: int
    files: dict[str, int]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A checkpoint that is being written into `folder`, which will be renamed to `final`."""

    folder: Path
    final: Path
    state: TrainerState

    def discard(self) -> None:
        """It is not to be."""
        shutil.rmtree(self.folder, ignore_errors=True)


class RunFolder:
    """One run's folder."""

    def __init__(self, config: TrainerConfig, path: Path | None = None) -> None:
        """`path`: where it lies now, if it was moved."""
        self.path = path or Path(
            config.default_local_dir, config.project_name, config.experiment_name
        )
        self.checkpoints = self.path / "checkpoints"
        self.restart = self.path / "restart"
        self.samples = self.path / "samples.jsonl"
        self.lengths = self.path / "lengths.jsonl"
        self._keep = config.max_checkpoints

    def create(self, config_yaml: str) -> None:
        """Make the folder and write what the run is and where it runs."""
        (self.path / "timeline").mkdir(parents=True, exist_ok=True)
        self.checkpoints.mkdir(exist_ok=True)
        write_whole(self.path / "config.yaml", config_yaml.encode())
        write_whole(self.path / "environment.json", msgspec.json.encode(environment()))

    def write_workers(self, pids: dict[str, int]) -> None:
        """Which process is which worker: for debuggers, and for those who look after the run."""
        write_whole(self.path / "workers.json", msgspec.json.encode(pids))

    def timeline(self, step: int) -> Path:
        return self.path / "timeline" / f"step_{step}.json"

    def add_samples(self, samples: list[ValidationSample]) -> None:
        with self.samples.open("ab") as file:
            for sample in samples:
                file.write(msgspec.json.encode(sample) + b"\n")

    def add_lengths(self, row: StepLengths) -> None:
        with self.lengths.open("ab") as file:
            file.write(msgspec.json.encode(row) + b"\n")

    def read_lengths(self) -> dict[int, StepLengths]:
        """By step; of a step that ran twice, the last time. A line that a crash cut off is left
        out. Raises OSError."""
        found = {}
        for line in self.lengths.read_bytes().splitlines():
            with contextlib.suppress(msgspec.DecodeError):
                row = msgspec.json.decode(line, type=StepLengths)
                found[row.step] = row
        return found

    # --- checkpoints -----------------------------------------------------------------------

    def begin(self, state: TrainerState) -> Unfinished:
        """A folder aside for a checkpoint. Raises OSError where it cannot be made."""
        return _begin(self.checkpoints / f"global_step_{state.step}", state)

    def finish(self, unfinished: Unfinished) -> Path:
        """Put a checkpoint in place: all else in its folder is written.

        Raises:
            OSError: the disk is full or the folder cannot be written; older ones are untouched.
        """
        state = unfinished.state
        final = _finish(unfinished)
        write_whole(self.checkpoints / _LATEST, str(state.step).encode())
        self._prune(state)
        # Training went on meanwhile: a restart state may be newer.
        if all(_step_of(kept) <= state.step for kept in self.restart.glob("step_*")):
            shutil.rmtree(self.restart, ignore_errors=True)
        return final

    def save(self, state: TrainerState, write: Callable[[Path], None]) -> Path:
        """Let `write` fill a folder aside, then put it in place: it is whole, or not there.

        Raises:
            OSError: as `finish`.
        """
        return self.finish(_filled(self.begin(state), write))

    def keep(self, state: TrainerState, write: Callable[[Path], None]) -> Path:
        """As `save`, for a restart state: it takes the place of the one before. Raises OSError."""
        final = _finish(_filled(_begin(self.restart / f"step_{state.step}", state), write))
        for older in self.restart.iterdir():
            if older != final:
                shutil.rmtree(older)
        return final

    def newest(self) -> Path | None:
        """The newest whole state to go on from, a restart state or a checkpoint.

        Raises:
            ValueError: as `latest`.
        """
        found = [folder for folder in (self.latest(),) if folder is not None]
        for folder in sorted(self.restart.glob("step_*")):
            try:
                check_manifest(folder)
                found.append(folder)
            except ValueError as error:
                logger.warning("%s", error)
        return max(found, key=lambda folder: load_state(folder).step, default=None)

    def latest(self) -> Path | None:
        """The newest whole checkpoint, or None.

        Raises:
            ValueError: one is named as the latest but is missing or damaged.
        """
        if not (self.checkpoints / _LATEST).is_file():
            return None
        folder = self.checkpoints / latest_name(self.checkpoints)
        check_manifest(folder)
        return folder

    def _prune(self, state: TrainerState) -> None:
        if not self._keep:
            return
        found = sorted(self.checkpoints.glob("global_step_*"), key=_step_of)
        kept = {p.name for p in found[-self._keep :]} | {f"global_step_{state.best_step}"}
        for folder in found:
            if folder.name not in kept:
                shutil.rmtree(folder)


def _begin(final: Path, state: TrainerState) -> Unfinished:
    aside = final.with_name(f".{final.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    return Unfinished(aside, final, state)


def _filled(unfinished: Unfinished, write: Callable[[Path], None]) -> Unfinished:
    try:
        write(unfinished.folder)
    except BaseException:
        unfinished.discard()
        raise
    return unfinished


def _finish(unfinished: Unfinished) -> Path:
    """Complete what is aside, and give it its name."""
    aside, final, state = unfinished.folder, unfinished.final, unfinished.state
    try:
        write_whole(aside / _STATE, msgspec.json.encode(state))
        files = {
            str(p.relative_to(aside)): p.stat().st_size
            for p in sorted(aside.rglob("*"))
            if p.is_file()
        }
        write_whole(aside / _MANIFEST, msgspec.json.encode(Manifest(state.step, files)))
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
    except BaseException:
        unfinished.discard()
        raise
    return final


def _step_of(folder: Path) -> int:
    return int(folder.name.rsplit("_", 1)[1])


def latest_name(checkpoints: Path) -> str:
    """The name of the newest checkpoint folder, as its marker says."""
    marker = checkpoints / _LATEST
    if not marker.is_file():
        raise ValueError(f"{checkpoints} holds no checkpoint: no {_LATEST} there")
    return f"global_step_{marker.read_text().strip()}"


def load_state(folder: Path) -> TrainerState:
    """The controller's state in a checkpoint."""
    try:
        return msgspec.json.decode((folder / _STATE).read_bytes(), type=TrainerState)
    except (OSError, msgspec.DecodeError) as error:
        raise ValueError(f"checkpoint {folder}: {_STATE} cannot be read: {error}") from error


def check_manifest(folder: Path) -> None:
    """Every file that a checkpoint lists is there, in full.

    Raises:
        ValueError: naming the first file that is not.
    """
    path = folder / _MANIFEST
    if not path.is_file():
        raise ValueError(f"checkpoint {folder} has no {_MANIFEST}: it is not whole")
    manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    for name, size in manifest.files.items():
        file = folder / name
        actual = file.stat().st_size if file.is_file() else -1
        if actual != size:
            have = "it is missing" if actual < 0 else f"it has {actual}"
            raise ValueError(f"checkpoint {folder}: {name} should have {size} bytes, {have}")


def write_whole(path: Path, data: bytes) -> None:
    """Write a file such that a reader sees the old or the new one, never a part."""
    aside = path.with_name(f".{path.name}.part")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def environment() -> dict[str, str | int]:
    """Hardware and versions, for reports and results."""
    found: dict[str, str | int] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=True) or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.platform(),
        "python": platform.python_version(),
    }
    for package in ("rlhfuse", "torch", "transformers", "ray", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["vllm"] = installed_version() or "not installed"
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"
