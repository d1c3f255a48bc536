"""Schedules as text: FlexFusion's simulated traces, and torch.distributed.pipelining's CSV."""

import csv
import gzip
import re
from pathlib import Path

from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.schedules.ir import Op, Pipeline, Problem, Schedule, Task
from rlhfuse.timeline import Kind, Span, Timeline

_NUMBER = r"-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?"
_ENTRY = re.compile(
    rf"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*({_NUMBER})\s*,\s*({_NUMBER})\s*(?:,[^\]\[]*)?\]"
)
_FIRST_LINE = re.compile(rb"\s*(?:\[\s*\d+\s*,\s*\d+\s*,\s*\d+\s*,[^\]\[{}\"]*\][, ]*)+\s*$")
_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")
_OTHER_ACTION = re.compile(r"\d+_?[A-Z][A-Z_]*(?:[FBIW]?\d*)")
_UNITS = {Op.F: 1.0, Op.B: 2.0, Op.I: 1.0, Op.W: 1.0}
_MOST_TASKS = 5_000_000


def is_flexfusion(head: bytes) -> bool:
    """Whether text begins with a line of ``[model, micro-batch, stage, start, end, ...]``."""
    return bool(_FIRST_LINE.match(head.split(b"\n", 1)[0]))


def is_torch_csv(head: bytes) -> bool:
    """Whether text begins with a rank's row of actions like ``0F0``."""
    cells = head.split(b"\n", 1)[0].decode("ascii", errors="replace").strip().split(",")
    filled = [cell.strip() for cell in cells if cell.strip()]
    actions = sum(bool(_ACTION.fullmatch(cell)) for cell in filled)
    others = sum(bool(_OTHER_ACTION.fullmatch(cell)) for cell in filled)
    return actions > 0 and actions + others >= len(filled)


def open_flexfusion(paths: list[Path]) -> Trace:
    """One trace: a line per rank; times are in the trace's own unit, called seconds.

    Raises:
        ValueError: more than one file, or no entry in it.
    """
    path = _only(paths)
    text = _text(path).split("\n\n")[0].strip("\n")
    entries = [
        (rank, int(m[1]), int(m[2]), int(m[3]), float(m[4]), float(m[5]))
        for rank, line in enumerate(text.split("\n"))
        for m in _ENTRY.finditer(line)
    ]
    if not entries:
        raise ValueError(f"{path}: no [model, micro-batch, stage, start, end, memory] in it")
    stages: dict[int, int] = {}
    for _, model, _, stage, _, _ in entries:
        stages[model] = max(stages.get(model, 0), stage + 1)
    copies = _copies(entries)
    spans = []
    for rank, model, mb, stage, start, end in entries:
        p = (stages[model] + 1) // 2
        kind, at = (Kind.F, stage) if stage < p else (Kind.B, 2 * p - 1 - stage)
        copy = copies[model, min(stage, stages[model] - 1 - stage)].index(rank)
        name = f"model{model}{'abcdefghijklmnopqrstuvwxyz'[copy % 26] if copy else ''}"
        if end < start:
            raise ValueError(f"{path}: line {rank + 1}: an entry ends before it starts")
        spans.append(Span(f"rank{rank}", start, end, kind, f"{name}:{at}{kind.value}{mb}"))
    note = "a simulated trace: its time unit is shown as seconds"
    loaded = Loaded(Timeline(tuple(spans)), warnings=(note,))
    return Trace("flexfusion", (), lambda step: loaded)


def _copies(
    entries: list[tuple[int, int, int, int, float, float]],
) -> dict[tuple[int, int], list[int]]:
    """Ranks of each (model, stage): a model that is there twice has two of each."""
    ranks: dict[tuple[int, int], set[int]] = {}
    most: dict[int, int] = {}
    for _, model, _, stage, _, _ in entries:
        most[model] = max(most.get(model, 0), stage)
    for rank, model, _, stage, _, _ in entries:
        ranks.setdefault((model, min(stage, most[model] - stage)), set()).add(rank)
    return {key: sorted(found) for key, found in ranks.items()}


def open_torch_csv(paths: list[Path]) -> Trace:
    """One schedule, timed as its actions' usual costs are: F 1, B 2, I 1, W 1.

    Raises:
        ValueError: more than one file, or a schedule that cannot run.
    """
    from rlhfuse.schedules.timing import simulate  # loads the compiler: not for other formats

    path = _only(paths)
    rows: list[tuple[Task, ...]] = []
    skipped = 0
    for cells in csv.reader(_text(path).splitlines()):
        actions = [_ACTION.fullmatch(cell.strip()) for cell in cells if cell.strip()]
        skipped += sum(action is None for action in actions)
        rows.append(
            tuple(Task("model", Op(m[2]), int(m[1]), int(m[3])) for m in actions if m is not None)
        )
    try:
        timeline = simulate(_schedule(rows))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).splitlines()[0]}") from error
    notes = ["a schedule without times: F counts 1 s, B 2 s, I and W 1 s each"]
    if skipped:
        notes.append(f"{skipped} actions that compute nothing left out")
    loaded = Loaded(timeline, warnings=tuple(notes))
    return Trace("torch schedule", (), lambda step: loaded)


def _schedule(rows: list[tuple[Task, ...]]) -> Schedule:
    places: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for task in row:
            if places.setdefault(task.pp_stage, rank) != rank:
                raise ValueError(
                    f"stage {task.pp_stage} is on ranks {places[task.pp_stage]}, {rank}"
                )
    tasks = [task for row in rows for task in row]
    if sorted(places) != list(range(len(places))) or len(tasks) > _MOST_TASKS:
        raise ValueError(f"stages {sorted(places)[:20]} are not 0 to {len(places) - 1}")
    pipe = Pipeline.make(
        "model",
        [places[stage] for stage in range(len(places))],
        1 + max(task.microbatch for task in tasks),
        _UNITS[Op.F],
        _UNITS[Op.B] if any(task.op is not Op.F for task in tasks) else 0.0,
        weight=_UNITS[Op.W] if any(task.op is Op.W for task in tasks) else 0.0,
        interleaved=len(set(places.values())) < len(places),
    )
    schedule = Schedule(Problem(len(rows), (pipe,)), tuple(rows))
    schedule.validate()
    return schedule


def _only(paths: list[Path]) -> Path:
    if len(paths) > 1:
        raise ValueError(f"{paths[1]}: one schedule at a time; {paths[0]} is one already")
    return paths[0]


def _text(path: Path) -> str:
    data = path.read_bytes()
    if data.startswith(b"\x1f\x8b"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError) as error:
            raise ValueError(f"{path}: the gzip file is damaged: {error}") from error
    return data.decode("utf-8", errors="replace")
