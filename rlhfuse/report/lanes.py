"""A timeline as compact data for the page's canvas: touching pieces per lane, base64 arrays."""

import base64
from collections.abc import Sequence

import msgspec
import numpy as np

from rlhfuse.profiler.attribution import Segment, device_lanes, segments_by_lane
from rlhfuse.profiler.causes import CAUSE_OF_KIND, Cause
from rlhfuse.profiler.intervals import paint
from rlhfuse.report.palette import Style, style_of
from rlhfuse.timeline import Kind, Timeline

_TICKS = 2**31  # the wall time in clock ticks of the page: under a nanosecond each for 2 s


class LaneData(msgspec.Struct, frozen=True, rename="camel"):
    """What ``timeline.js`` draws. Arrays are little-endian: uint32 ticks, uint8, uint32.

    Pieces of lane i are those from ``offsets[i]`` to ``offsets[i + 1]``; `edges` of a piece are
    its start and the start of the next one, so a lane has one edge more than pieces.
    """

    title: str
    wall_s: float
    tick_s: float
    lanes: tuple[str, ...]
    offsets: tuple[int, ...]
    edges: str
    styles: str
    names: str
    style_table: tuple[tuple[str, str, bool], ...]  # label, colour, idle
    name_table: tuple[str, ...]
    style_seconds: tuple[float, ...]  # of the devices' time, per style


def lane_data(timeline: Timeline, title: str) -> LaneData:
    """Pieces of every lane, devices first."""
    devices = device_lanes(timeline)
    others = tuple(lane for lane in timeline.lanes if lane not in devices)
    rows = dict(segments_by_lane(timeline, lanes=devices))
    for lane in others:
        rows[lane] = _plain(timeline, lane)
    packer = _Packer(timeline.start_s, max(timeline.wall_s, 1e-9))
    for lane, segments in rows.items():
        packer.add(segments, counted=lane in devices)
    return packer.data(title, tuple(rows))


def _plain(timeline: Timeline, lane: str) -> tuple[Segment, ...]:
    """Spans of a lane that is no device: what it does not do is not explained."""
    pieces = paint(timeline.of_lane(lane), timeline.start_s, timeline.end_s)
    return tuple(
        Segment(
            piece.start_s,
            piece.end_s,
            CAUSE_OF_KIND.get(piece.span.kind, Cause.CONTROLLER)
            if piece.span
            else Cause.CONTROLLER,
            piece.span if piece.span and piece.span.kind is not Kind.WAIT else None,
        )
        for piece in pieces
    )


_NOTHING = Style("nothing", "#00000000", True)


class _Packer:
    """Collects pieces lane by lane into flat arrays and tables."""

    def __init__(self, start_s: float, wall_s: float) -> None:
        self._start_s = start_s
        self._wall_s = wall_s
        self._styles: dict[Style, int] = {}
        self._seconds: list[float] = []
        self._names: dict[str, int] = {}
        self._offsets = [0]
        self._edges: list[float] = []
        self._style_of: list[int] = []
        self._name_of: list[int] = []

    def add(self, segments: Sequence[Segment], counted: bool) -> None:
        for segment in segments:
            idle_elsewhere = not counted and segment.span is None
            style = _NOTHING if idle_elsewhere else style_of(segment.cause, segment.span)
            index = self._styles.setdefault(style, len(self._styles))
            if index == len(self._seconds):
                self._seconds.append(0.0)
            self._seconds[index] += segment.end_s - segment.start_s if counted else 0.0
            name = segment.span.name if segment.span is not None else ""
            self._edges.append(segment.start_s)
            self._style_of.append(index)
            self._name_of.append(self._names.setdefault(name, len(self._names)))
        self._edges.append(self._start_s + self._wall_s)
        self._offsets.append(len(self._style_of))

    def data(self, title: str, lanes: tuple[str, ...]) -> LaneData:
        assert len(self._styles) < 256
        ticks = (np.array(self._edges) - self._start_s) * (_TICKS / self._wall_s)
        return LaneData(
            title=title,
            wall_s=self._wall_s,
            tick_s=self._wall_s / _TICKS,
            lanes=lanes,
            offsets=tuple(self._offsets),
            edges=_base64(np.clip(np.rint(ticks), 0, _TICKS).astype("<u4")),
            styles=_base64(np.array(self._style_of, dtype="u1")),
            names=_base64(np.array(self._name_of, dtype="<u4")),
            style_table=tuple((s.label, s.color, s.idle) for s in self._styles),
            name_table=tuple(self._names),
            style_seconds=tuple(self._seconds),
        )


def _base64(values: "np.ndarray[tuple[int], np.dtype[np.generic]]") -> str:
    return base64.b64encode(values.tobytes()).decode()
