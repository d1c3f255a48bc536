"""Our own runs: ``timeline/step_N.json`` in a run folder, or single files by `save_chrome`."""

import re
from pathlib import Path

from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import load_chrome

_NAME = re.compile(r"step_(\d+)\.json(\.gz)?")


def open_run(folder: Path) -> Trace:
    """The steps of a run folder.

    Raises:
        ValueError: no step was recorded.
    """
    files = {
        int(match[1]): path
        for path in sorted((folder / "timeline").glob("step_*"))
        if (match := _NAME.fullmatch(path.name))
    }
    if not files:
        raise ValueError(f"{folder}: a run folder, but timeline/ holds no step_N.json")
    return _trace("rlhfuse run", files)


def open_files(paths: list[Path]) -> Trace:
    """Files written by `save_chrome`, one a step; numbered by name, else in the order given.

    Raises:
        ValueError: two files have the same step number.
    """
    files: dict[int, Path] = {}
    for position, path in enumerate(paths):
        match = _NAME.fullmatch(path.name)
        step = int(match[1]) if match else position
        if step in files:
            raise ValueError(f"{path}: {files[step]} is step {step} already; give one of them")
        files[step] = path
    return _trace("rlhfuse timeline", files)


def _trace(name: str, files: dict[int, Path]) -> Trace:
    steps = tuple(sorted(files))

    def load(step: int | None) -> Loaded:
        return Loaded(load_chrome(files[steps[-1] if step is None else step]))

    return Trace(name, steps, load)
