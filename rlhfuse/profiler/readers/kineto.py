"""PyTorch profiler traces (Kineto JSON), one file per rank.

Kernels say what a device did, not for whom. Pipeline work is recognised by labels only: ranges
named like tasks (``PP:0F1``, ``actor:2F0``), as `rlhfuse.profiler.record` and PyTorch's pipelining
write them. SendRecv kernels alone prove nothing: all-to-all uses them too.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from rlhfuse.profiler.readers.stream import OnProgress, TraceStream
from rlhfuse.profiler.trace import Loaded, Trace
from rlhfuse.timeline import Kind, Span, Timeline

_DEVICE_CATEGORIES = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
_COLLECTIVE = re.compile(r"(?i)(nccl|rccl|msccl|hccl|oneccl)")
_LABEL = re.compile(r"(?:PP:)?(?:(?P<pipe>[A-Za-z_]\w*):)?(?P<stage>\d+)(?P<op>[FBIW])(?P<mb>\d+)")
_STEP = re.compile(r"ProfilerStep#(\d+)")
_RANK_IN_NAME = re.compile(r"rank[-_]?(\d+)", re.IGNORECASE)
_DISTRIBUTED = re.compile(rb'"distributedInfo"\s*:\s*\{')


class _Args(msgspec.Struct):
    collective: object = msgspec.field(default=None, name="Collective name")


class _Event(msgspec.Struct):
    ph: str = ""
    cat: str = ""
    name: str = ""
    ts: int | float = 0
    dur: float = 0.0
    args: _Args | None = None


@dataclass(slots=True)
class _Rank:
    """What one file says; times in microseconds of its own clock."""

    rank: int
    world_size: int | None
    spans: list[tuple[float, float, Kind, str]] = field(default_factory=list)
    steps: dict[int, tuple[float, float]] = field(default_factory=dict)
    labels: list[tuple[float, float, Kind, str]] = field(default_factory=list)
    annotations: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)


def open_kineto(paths: list[Path], on_progress: OnProgress | None = None) -> Trace:
    """All ranks of one job.

    Raises:
        ValueError: no device activity, a rank given twice, or ranks of different jobs.
    """
    ranks: dict[int, _Rank] = {}
    for position, path in enumerate(paths):
        rank = _read(path, position, on_progress)
        if rank.rank in ranks:
            raise ValueError(f"{path}: rank {rank.rank} is given twice")
        ranks[rank.rank] = rank
    worlds = {rank.world_size for rank in ranks.values() if rank.world_size is not None}
    if len(worlds) > 1:
        raise ValueError(
            f"{paths[0].parent}: ranks of different jobs (world sizes {sorted(worlds)})"
        )
    if not any(rank.spans for rank in ranks.values()):
        raise ValueError(f"{paths[0]}: no kernels: the profiler recorded no device activity")
    steps = set.intersection(*(set(rank.steps) for rank in ranks.values()))
    warnings = _missing_ranks(ranks, worlds) + [w for rank in ranks.values() for w in rank.warnings]

    def load(step: int | None) -> Loaded:
        return _load(ranks, step, warnings)

    return Trace("kineto", tuple(sorted(steps)), load)


def _read(path: Path, position: int, on_progress: OnProgress | None) -> _Rank:
    stream = TraceStream(path, on_progress)
    found = _Rank(rank=-1, world_size=None)
    for event in stream.events(_Event):
        if event.ph == "X":
            _take(event, found)
    around = stream.head + stream.tail
    named = _RANK_IN_NAME.search(path.name)
    told = _number(around, b"rank")
    found.rank = told if told is not None else int(named[1]) if named else position
    found.world_size = _number(around, b"world_size")
    if told is None:
        source = "its name" if named else "the order of files"
        found.warnings.append(f"{path.name}: no distributedInfo; rank {found.rank} from {source}")
    if stream.broken:
        found.warnings.append(f"{path.name}: {stream.broken}; what could be read is used")
    return found


def _take(event: _Event, found: _Rank) -> None:
    category = event.cat.lower()
    if category in _DEVICE_CATEGORIES:
        kind = Kind.COMPUTE
        if category != "kernel" or _COLLECTIVE.match(event.name):
            kind = Kind.TRANSFER
        found.spans.append((event.ts, event.dur, kind, event.name))
        if "SendRecv" in event.name:
            collective = event.args.collective if event.args is not None else None
            known = collective if isinstance(collective, str) else "unnamed"
            found.annotations[f"SendRecv kernel, {known}"] += 1
        return
    if category not in ("user_annotation", "gpu_user_annotation"):
        return
    step = _STEP.fullmatch(event.name)
    label = _LABEL.fullmatch(event.name)
    if step is not None and category == "user_annotation":
        found.steps[int(step[1])] = (event.ts, event.ts + event.dur)
    elif label is not None and category == "gpu_user_annotation":
        task = f"{label['pipe'] or 'model'}:{label['stage']}{label['op']}{label['mb']}"
        found.labels.append((event.ts, event.dur, Kind(label["op"]), task))
    elif event.name.startswith("nccl:"):
        found.annotations[event.name.split(" ")[0]] += 1


def _number(text: bytes, key: bytes) -> int | None:
    place = _DISTRIBUTED.search(text)
    if place is None:
        return None
    match = re.compile(rb'"' + key + rb'"\s*:\s*(\d+)').search(text, place.end())
    return int(match[1]) if match else None


def _missing_ranks(ranks: dict[int, _Rank], worlds: set[int]) -> list[str]:
    world = next(iter(worlds), len(ranks))
    if world <= len(ranks):
        return []
    return [f"{len(ranks)} of the job's {world} ranks are here; sums are over these"]


def _load(ranks: dict[int, _Rank], step: int | None, warnings: Iterable[str]) -> Loaded:
    """One step, or everything, of all ranks on a clock that starts at the first event."""
    windows = {r: rank.steps[step] for r, rank in ranks.items()} if step is not None else {}
    zero = min(
        windows[r][0] if windows else min(entry[0] for entry in rank.spans)
        for r, rank in ranks.items()
        if rank.spans
    )
    spans = []
    for r, rank in sorted(ranks.items()):
        begin, finish = windows.get(r, (float("-inf"), float("inf")))
        for ts, dur, kind, name in (*rank.spans, *rank.labels):
            if begin <= ts < finish:
                start_s = (ts - zero) / 1e6
                spans.append(Span(f"rank{r}", start_s, start_s + dur / 1e6, kind, name))
    if not spans:
        raise ValueError(f"step {step}: no device activity in it")
    pipelines = any(rank.labels for rank in ranks.values())
    told = [*warnings] if pipelines else [*warnings, _no_pipeline(ranks)]
    return Loaded(Timeline(tuple(spans)), pipelines=pipelines, warnings=tuple(told))


def _no_pipeline(ranks: dict[int, _Rank]) -> str:
    seen: Counter[str] = sum((rank.annotations for rank in ranks.values()), Counter())
    traffic = ", ".join(f"{count} {name}" for name, count in sorted(seen.items()))
    text = "no pipeline work is labelled, so no bubble fraction is given, only busy and idle time"
    return f"{text} (seen: {traffic})" if traffic else text
