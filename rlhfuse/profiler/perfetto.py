"""A profile for Perfetto: work and idle causes as tracks per rank, messages as arrows."""

from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec

from rlhfuse.profiler.attribution import lane_segments
from rlhfuse.profiler.causes import CAUSES
from rlhfuse.profiler.rounds import TRAINING_KINDS, find_rounds, parse_task, remote_inputs
from rlhfuse.profiler.table import KINDS, SpanTable
from rlhfuse.timeline import Kind

_WORK, _IDLE = 0, 1
_BATCH = 10_000


class Flow(NamedTuple):
    """A message between lanes: from the end of its producer to the start of its consumer."""

    source: str
    sent_s: float
    target: str
    used_s: float


def flows(table: SpanTable) -> list[Flow]:
    """Messages between named tasks of different lanes, by time of use."""
    found = []
    for training in find_rounds(table.spans(table.is_kind((*TRAINING_KINDS, Kind.OPTIMIZER)))):
        made = {
            task: (lane, span.end_s)
            for lane, spans in training.spans.items()
            for span in spans
            if (task := parse_task(span.name)) is not None
        }
        for lane, spans in training.spans.items():
            for span in spans:
                task = parse_task(span.name)
                for needed in remote_inputs(task) if task is not None else ():
                    source, sent_s = made.get(needed, (lane, 0.0))
                    if source != lane:
                        found.append(Flow(source, sent_s, lane, span.start_s))
    found.sort(key=lambda flow: flow.used_s)
    return found


def save_perfetto(table: SpanTable, path: Path) -> None:
    """Write Chrome trace JSON: process = lane, threads = work and causes of idle time."""
    encoder = msgspec.json.Encoder()
    with path.open("wb") as file:
        file.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        first = True
        batch: list[bytes] = []
        for event in _events(table):
            batch.append(encoder.encode(event))
            if len(batch) == _BATCH:
                _flush(file, batch, first)
                first = False
        _flush(file, batch, first)
        file.write(b"\n]}\n")


def _flush(file: BinaryIO, batch: list[bytes], first: bool) -> None:
    if batch:
        file.write((b"" if first else b",\n") + b",\n".join(batch))
        batch.clear()


def _events(table: SpanTable) -> Iterator[dict[str, object]]:
    places = {lane: place for place, lane in enumerate(table.lanes)}
    for lane, place in places.items():
        yield _meta("process_name", place, 0, lane)
        yield {**_meta("process_sort_index", place, 0, ""), "args": {"sort_index": place}}
        yield _meta("thread_name", place, _WORK, "work")
        yield _meta("thread_name", place, _IDLE, "idle, by cause")
    wait = KINDS.index(Kind.WAIT)
    for row in range(len(table)):
        if table.kind[row] != wait:
            span = table.span(row)
            yield {
                **_slice(span.name, places[span.lane], _WORK, span.start_s, span.end_s),
                "cat": span.kind.value,
                "args": span.args,
            }
    grid, rows = lane_segments(table)
    for lane, segments in rows.items():
        edges = (segments.edges_s + grid.start_s).tolist()
        for i, (cause, span) in enumerate(
            zip(segments.cause.tolist(), segments.span.tolist(), strict=True)
        ):
            if span < 0:
                name = f"idle: {CAUSES[cause].value}"
                yield _slice(name, places[lane], _IDLE, edges[i], edges[i + 1])
    for number, flow in enumerate(flows(table)):
        shared = {"cat": "message", "name": "message", "id": number, "tid": _WORK}
        # An arrow binds to the slice around its moment: just inside both ends.
        yield {"ph": "s", "pid": places[flow.source], "ts": flow.sent_s * 1e6 - 1e-3, **shared}
        end = {"ph": "f", "bp": "e", "pid": places[flow.target], "ts": flow.used_s * 1e6 + 1e-3}
        yield {**end, **shared}


def _slice(name: str, pid: int, tid: int, start_s: float, end_s: float) -> dict[str, object]:
    shared = {"ph": "X", "name": name, "pid": pid, "tid": tid}
    return {**shared, "ts": start_s * 1e6, "dur": (end_s - start_s) * 1e6}


def _meta(what: str, pid: int, tid: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}
