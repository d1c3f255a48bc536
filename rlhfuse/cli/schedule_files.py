"""Schedules in files, by the ending of their name: ours, torch's, FlexFusion's."""

from collections.abc import Callable
from pathlib import Path

from rlhfuse.schedules.formats import (
    from_flexfusion,
    from_torch_csv,
    schedule_from_json,
    schedule_to_json,
    to_flexfusion,
    to_torch_csv,
)
from rlhfuse.schedules.ir import Problem, Schedule
from rlhfuse.schedules.timing import check_channels


def check_ending(option: str, path: Path | None) -> None:
    """Refuse a name whose ending says no known format, before anything is searched.

    Raises:
        ValueError: the option, the name and the endings known.
    """
    if path is not None and path.suffix not in _WRITERS:
        raise ValueError(f"{option} is {path}, expected a name that ends in .json, .csv or .txt")


def check_folder(option: str, path: Path | None) -> None:
    """Refuse to search for what could not be written.

    Raises:
        ValueError: the option, the name and the folder that is missing.
    """
    if path is not None and not path.parent.is_dir():
        raise ValueError(f"{option} is {path}, but there is no folder {path.parent}")


def write_schedule(schedule: Schedule, path: Path) -> None:
    """Write the schedule in the format of `path`'s ending.

    torch's CSV holds one pipeline: of several, each goes to its own file, ``out.actor.csv``.

    Raises:
        ValueError: the format cannot say this schedule.
    """
    names = [pipe.name for pipe in schedule.problem.pipelines]
    if path.suffix == ".csv" and len(names) > 1:
        for name in names:
            own = path.with_name(f"{path.stem}.{name}.csv")
            own.write_text(to_torch_csv(schedule, name))
        return
    data = _WRITERS[path.suffix](schedule)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def read_schedule(path: Path, problem: Problem) -> Schedule:
    """The schedule of `problem` in a file: valid and executable.

    Raises:
        ValueError: the file holds no such schedule.
    """
    try:
        found = _READERS[path.suffix](path.read_text(), problem)
        check_channels(found)
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    return found


def _read_json(text: str, problem: Problem) -> Schedule:
    found = Schedule(problem, schedule_from_json(text).rows)
    found.validate()
    return found


_READERS: dict[str, Callable[[str, Problem], Schedule]] = {
    ".json": _read_json,
    ".csv": from_torch_csv,
    ".txt": from_flexfusion,
}
_WRITERS: dict[str, Callable[[Schedule], bytes | str]] = {
    ".json": schedule_to_json,
    ".csv": to_torch_csv,
    ".txt": to_flexfusion,
}
