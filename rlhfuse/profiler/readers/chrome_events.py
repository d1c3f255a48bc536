"""Chrome event lists whose events say step, micro-batch and stage in their arguments.

NDTimeline, StragglerAnalysis and home-made tracers write such files, each with names of its own;
`FieldNames` says where things are, with the usual ones by default. Complete (X) and paired (B, E)
events are read; times are microseconds.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from rlhfuse.profiler.readers.stream import TraceStream
from rlhfuse.profiler.readers.unnumbered import Pass, numbers
from rlhfuse.profiler.rounds import TRAINING_KINDS
from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import Kind, Span, Timeline

_RANK = re.compile(r"(?i)rank\D?(\d+)|(\d+)\D*$")  # "rank 3 host 7" is 3, "worker 4" is 4


class FieldNames(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Argument names by meaning, and patterns that event names match (``--map`` file).

    Without an argument that says the rank, it is the one in the thread's name (``rank 3``), else
    the number in the process' name, else the place of the process among all.
    """

    step: tuple[str, ...] = ("step", "global_step", "iteration")
    microbatch: tuple[str, ...] = ("microbatch", "mb", "mb_id", "micro_batch", "micro_batch_id")
    stage: tuple[str, ...] = ("stage", "pp_stage", "pp_rank", "pp")
    chunk: tuple[str, ...] = ("chunk", "vpp_rank", "model_chunk", "chunk_id")
    rank: tuple[str, ...] = ("rank", "global_rank")
    pipeline: tuple[str, ...] = ("pipeline", "model")
    forward: str = r"(?i)^(f|fwd|forward)"
    backward: str = r"(?i)^(b|bwd|backward)"
    input_gradient: str = r"(?i)^(i$|input.?grad|backward.?input|bwd.?i)"
    weight_gradient: str = r"(?i)^(w$|wgrad|weight.?grad|backward.?weight|bwd.?w)"
    transfer: str = r"(?i)(send|recv|nccl|all.?reduce|all.?gather|reduce.?scatter|p2p)"
    optimizer: str = r"(?i)optim"


# Names that known makers of traces use, for ``--map NAME``.
PRESETS = {
    "usual": FieldNames(),
    # veScale's NDTimeline: one event list, micro-batch and chunk as arguments.
    "ndtimeline": FieldNames(
        step=("global_step", "step"),
        microbatch=("mb", "microbatch_id", "micro_batch_id", "mb_id"),
        chunk=("chunk", "model_chunk_id", "chunk_id"),
        forward=r"(?i)forward-?compute|^fwd",
        backward=r"(?i)backward-?compute|^bwd",
    ),
    # StragglerAnalysis: op names such as forward-compute, ranks as dp and pp coordinates.
    "stragglers": FieldNames(
        step=("step_id", "step"),
        microbatch=("mb_id", "microbatch"),
        chunk=("vpp_id", "vpp_rank", "chunk"),
        stage=("pp_rank", "pp"),
        forward=r"(?i)^forward-?compute",
        backward=r"(?i)^backward-?compute",
    ),
    # Megatron's own NVTX or timer names, exported by hand.
    "megatron": FieldNames(
        microbatch=("microbatch", "current_microbatch", "mb"),
        stage=("pipeline_parallel_rank", "pp_rank"),
        chunk=("virtual_pipeline_rank", "vp_stage", "vpp_rank"),
        forward=r"(?i)^forward[-_ ]?(step|compute)",
        backward=r"(?i)^backward[-_ ]?(step|compute)",
    ),
}


class _Event(msgspec.Struct):
    ph: str = ""
    name: str = ""
    ts: float = 0.0
    dur: float = 0.0
    pid: int | str = 0
    tid: int | str = 0
    args: dict[str, object] = {}


@dataclass(frozen=True, slots=True)
class _Row:
    """One event with what its arguments say."""

    rank: int
    start_s: float
    end_s: float
    name: str
    kind: Kind
    step: int | None
    task: tuple[str, int, int, int] | None  # pipeline, chunk, stage, micro-batch (-1: not said)


def open_chrome_events(paths: list[Path], names: FieldNames | None = None) -> Trace:
    """One trace in one or more files.

    Raises:
        ValueError: nothing in it can be read as an event.
    """
    rows = [row for path in paths for row in _read(path, names or FieldNames())]
    if not rows:
        raise ValueError(f"{paths[0]}: no event with a duration in it")
    steps = tuple(sorted({row.step for row in rows if row.step is not None}))

    def load(step: int | None) -> Loaded:
        return _load([row for row in rows if step is None or row.step == step])

    return Trace("chrome events", steps, load)


def _read(path: Path, names: FieldNames) -> Iterator[_Row]:
    events = list(TraceStream(path).events(_Event))
    processes = {
        str(e.pid): str(e.args.get("name", ""))
        for e in events
        if e.ph == "M" and e.name == "process_name"
    }
    ranks = _ranks(events, processes)
    threads = _thread_ranks(events)
    kinds = _kinds(names)
    for event in _paired(events):
        pid = str(event.pid)
        rank = _argument(event.args, names.rank)
        if rank is None:
            rank = threads.get((pid, str(event.tid)), ranks[pid])
        kind = next((kind for pattern, kind in kinds if pattern.search(event.name)), Kind.OTHER)
        stage = _argument(event.args, names.stage)
        microbatch = _argument(event.args, names.microbatch)
        pipeline = next((str(event.args[n]) for n in names.pipeline if n in event.args), "model")
        chunk = _argument(event.args, names.chunk) or 0
        task = None
        if kind in TRAINING_KINDS:
            number = -1 if microbatch is None else microbatch
            task = (_word(pipeline), chunk, rank if stage is None else stage, number)
        start_s, end_s = event.ts / 1e6, (event.ts + event.dur) / 1e6
        step = _argument(event.args, names.step)
        yield _Row(rank, start_s, end_s, event.name, kind, step, task)


def _thread_ranks(events: Iterable[_Event]) -> dict[tuple[str, str], int]:
    """Ranks that the names of threads say (``rank 3``), by process and thread."""
    found = {}
    for event in events:
        if event.ph == "M" and event.name == "thread_name":
            match = _RANK.search(str(event.args.get("name", "")))
            if match is not None and match[1]:
                found[str(event.pid), str(event.tid)] = int(match[1])
    return found


def _ranks(events: Iterable[_Event], processes: Mapping[str, str]) -> dict[str, int]:
    """The rank of every process, where its events do not say it."""
    pids = sorted(
        {e.pid for e in events if e.ph != "M"}, key=lambda pid: (isinstance(pid, str), pid)
    )
    ranks = {}
    for place, pid in enumerate(pids):
        text = processes.get(str(pid), pid if isinstance(pid, str) else "")
        found = _RANK.search(text)
        ranks[str(pid)] = int(found[1] or found[2]) if found else place
    return ranks


def _paired(events: Iterable[_Event]) -> Iterator[_Event]:
    """X events as they are, and B with their E as X."""
    opened: dict[tuple[str, str], list[_Event]] = {}
    for event in sorted(events, key=lambda event: event.ts):
        stack = opened.setdefault((str(event.pid), str(event.tid)), [])
        if event.ph == "X":
            yield event
        elif event.ph == "B":
            stack.append(event)
        elif event.ph == "E" and stack:
            begin = stack.pop()
            yield msgspec.structs.replace(begin, dur=event.ts - begin.ts)


def _kinds(names: FieldNames) -> list[tuple[re.Pattern[str], Kind]]:
    """Patterns in the order in which they are tried.

    Raises:
        ValueError: a pattern is not a regular expression.
    """
    patterns = (
        (names.transfer, Kind.TRANSFER),
        (names.optimizer, Kind.OPTIMIZER),
        (names.weight_gradient, Kind.W),
        (names.input_gradient, Kind.I),
        (names.backward, Kind.B),
        (names.forward, Kind.F),
    )
    try:
        return [(re.compile(pattern), kind) for pattern, kind in patterns]
    except re.error as error:
        raise ValueError(f"--map: {error.pattern!r} is not a regular expression") from error


def _argument(args: Mapping[str, object], names: Iterable[str]) -> int | None:
    """The first of the named arguments that holds a whole number."""
    for name in names:
        value = args.get(name)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
            return value
    return None


def _word(text: str) -> str:
    """A pipeline's name as tasks can hold it."""
    return re.sub(r"[\s:]+", "_", text) or "model"


def _load(rows: list[_Row]) -> Loaded:
    zero = min(row.start_s for row in rows)
    rows, told = _numbered(rows)
    depth = 1 + max((row.task[2] for row in rows if row.task is not None), default=0)
    spans, labelled = [], False
    for row in rows:
        name = row.name
        if row.task is not None and row.task[3] >= 0:
            pipeline, chunk, stage, microbatch = row.task
            name = f"{pipeline}:{chunk * depth + stage}{row.kind.value}{microbatch}"
            labelled = True
        lane = f"rank{row.rank}"
        spans.append(Span(lane, row.start_s - zero, row.end_s - zero, row.kind, name))
    if not labelled:
        told = (*told, "no event says its micro-batch: no bubble fraction is given")
    return Loaded(Timeline(tuple(spans)), pipelines=labelled, warnings=told)


def _numbered(rows: list[_Row]) -> tuple[list[_Row], tuple[str, ...]]:
    """Rows whose micro-batches, where no event says them, are told by the order of passes."""
    tasks = [row.task for row in rows if row.task is not None]
    kinds = {row.kind for row in rows}
    if any(task[3] >= 0 for task in tasks) or not {Kind.F, Kind.B} <= kinds:
        return rows, ()
    depth = 1 + max(task[2] for task in tasks)
    places, passes = [], []
    for i, row in enumerate(rows):
        if row.task is not None or row.kind is Kind.OPTIMIZER:
            name, chunk, stage, _ = row.task or ("", 0, 0, -1)
            places.append(i)
            passes.append(
                Pass(row.rank, name, chunk * depth + stage, row.kind, row.start_s, row.end_s)
            )
    try:
        found = numbers(passes)
    except ValueError as error:
        return rows, (f"micro-batches are not told by the order of passes: {error}",)
    numbered = list(rows)
    for i, (name, microbatch) in zip(places, found, strict=True):
        task = rows[i].task
        if task is not None:
            numbered[i] = replace(rows[i], task=(name, task[1], task[2], microbatch))
    return numbered, ("no event says its micro-batch: numbered by the order of passes",)
