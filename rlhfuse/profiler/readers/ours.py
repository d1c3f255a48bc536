"""Our own runs: ``timeline/step_N.json`` in a run folder, or single files by `save_chrome`."""

import re
from pathlib import Path

from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import Timeline, load_chrome

_NAME = re.compile(r"step_(\d+)(?:\.rank_(\d+))?\.json(?:\.gz)?")


def open_run(folder: Path) -> Trace:
    """The steps of a run folder.

    Raises:
        ValueError: no step was recorded.
    """
    files = {
        int(match[1]): [path]
        for path in sorted((folder / "timeline").glob("step_*"))
        if (match := _NAME.fullmatch(path.name)) and match[2] is None
    }
    if not files:
        raise ValueError(f"{folder}: a run folder, but timeline/ holds no step_N.json")
    return _trace("rlhfuse run", files)


def recorded_steps(folder: Path) -> list[int]:
    """Steps of a run whose timelines are there, in order; none where none is."""
    found = (_NAME.fullmatch(path.name) for path in (folder / "timeline").glob("step_*"))
    return sorted(int(match[1]) for match in found if match is not None)


def open_files(paths: list[Path]) -> Trace:
    """Files written by `save_chrome`: one a step, or one a step and rank (`profiler.record`).

    Steps are numbered by the files' names, else in the order given.

    Raises:
        ValueError: two files are the same step, of the same rank.
    """
    files: dict[int, dict[str, Path]] = {}
    for position, path in enumerate(paths):
        match = _NAME.fullmatch(path.name)
        step, rank = (int(match[1]), match[2] or "") if match else (position, "")
        parts = files.setdefault(step, {})
        if rank in parts:
            raise ValueError(f"{path}: {parts[rank]} is the same step already; give one of them")
        parts[rank] = path
    return _trace("rlhfuse timeline", {step: list(parts.values()) for step, parts in files.items()})


def _trace(name: str, files: dict[int, list[Path]]) -> Trace:
    steps = tuple(sorted(files))
    most = max(map(len, files.values()))

    def load(step: int | None) -> Loaded:
        chosen = files[steps[-1] if step is None else step]
        parts = [load_chrome(path) for path in chosen]
        told: tuple[str, ...] = ()
        if len(chosen) < most:
            told = (f"files of {len(chosen)} ranks for this step, of {most} for others",)
        whole = parts[0] if len(parts) == 1 else Timeline.merged(parts)
        return Loaded(whole, warnings=told)

    return Trace(name, steps, load)
