"""A timeline as compact data for the page's canvas: touching pieces per lane, base64 arrays."""

import base64

import msgspec
import numpy as np

from rlhfuse.profiler.arrays import Floats, Ints
from rlhfuse.profiler.attribution import device_lanes, lane_segments
from rlhfuse.profiler.causes import CAUSES as CAUSE_LIST
from rlhfuse.profiler.perfetto import flows
from rlhfuse.profiler.segments import LaneSegments
from rlhfuse.profiler.table import SpanTable
from rlhfuse.report.palette import Style, style_of
from rlhfuse.timeline import Timeline

_MOST_FLOWS = 200_000
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
    flows: str  # messages by time of use: uint32 lane, tick sent, lane, tick used
    style_seconds: tuple[float, ...]  # of the devices' time, per style


def lane_data(timeline: Timeline | SpanTable, title: str) -> LaneData:
    """Pieces of every lane, devices first."""
    table = SpanTable.of(timeline)
    devices = device_lanes(table)
    others = tuple(lane for lane in table.lanes if lane not in devices)
    window = (table.begin_s, max(table.finish_s, table.begin_s + 1e-9))
    packer = _Packer(table, window[1] - window[0])
    for lanes in (devices, others):
        _, rows = lane_segments(table, lanes=lanes, window=window)
        for segments in rows.values():
            # What a lane that is no device does not do is not explained.
            packer.add(segments, counted=lanes is devices)
    return packer.data(title, (*devices, *others))


_NOTHING = Style("nothing", "#00000000", True)


class _Packer:
    """Collects pieces lane by lane into flat arrays and tables."""

    def __init__(self, table: SpanTable, wall_s: float) -> None:
        self._table = table
        self._wall_s = wall_s
        self._styles: dict[Style, int] = {}
        self._seconds: list[float] = []
        self._offsets = [0]
        self._edges: list[Floats] = []
        self._style_of: list[Ints] = []
        self._name_of: list[Ints] = []

    def add(self, segments: LaneSegments, counted: bool) -> None:
        table = self._table
        works = segments.span >= 0
        name = np.where(works, table.name[np.maximum(segments.span, 0)], -1)
        # Few sorts of pieces: each sort's style is looked up once.
        sorts, place = np.unique(
            segments.cause * (len(table.names) + 1) + name + 1, return_inverse=True
        )
        styles = np.array([self._style(int(sort), counted) for sort in sorts], dtype=np.int64)
        style = styles[place]
        if counted:
            spent = np.bincount(style, np.diff(segments.edges_s), minlength=len(self._seconds))
            self._seconds = (np.array(self._seconds) + spent).tolist()
        self._edges.append(segments.edges_s)
        self._style_of.append(style)
        self._name_of.append(name + 1)
        self._offsets.append(self._offsets[-1] + len(style))

    def _style(self, sort: int, counted: bool) -> int:
        cause, name = divmod(sort, len(self._table.names) + 1)
        if name == 0 and not counted:
            style = _NOTHING
        else:
            text = self._table.names[name - 1] if name else None
            style = style_of(CAUSE_LIST[cause], text)
        index = self._styles.setdefault(style, len(self._styles))
        if index == len(self._seconds):
            self._seconds.append(0.0)
        return index

    def _flows(self, lanes: tuple[str, ...]) -> Floats:
        places = {lane: place for place, lane in enumerate(lanes)}
        begin_s, scale = self._table.begin_s, _TICKS / self._wall_s
        found = flows(self._table)
        rows = [
            (places[f.source], (f.sent_s - begin_s) * scale, places[f.target], f.used_s - begin_s)
            for f in (found if len(found) <= _MOST_FLOWS else [])
        ]
        table = np.array(rows, dtype=np.float64).reshape(-1, 4)
        table[:, 3] *= scale
        return np.clip(np.rint(table), 0, _TICKS)

    def data(self, title: str, lanes: tuple[str, ...]) -> LaneData:
        assert len(self._styles) < 256
        ticks = np.concatenate([np.empty(0), *self._edges]) * (_TICKS / self._wall_s)
        used, names = np.unique(_joined(self._name_of), return_inverse=True)
        return LaneData(
            title=title,
            wall_s=self._wall_s,
            tick_s=self._wall_s / _TICKS,
            lanes=lanes,
            offsets=tuple(self._offsets),
            edges=_base64(np.clip(np.rint(ticks), 0, _TICKS).astype("<u4")),
            styles=_base64(_joined(self._style_of).astype("u1")),
            names=_base64(names.astype("<u4")),
            style_table=tuple((s.label, s.color, s.idle) for s in self._styles),
            flows=_base64(self._flows(lanes).astype("<u4")),
            name_table=tuple(self._table.names[n - 1] if n else "" for n in used.tolist()),
            style_seconds=tuple(self._seconds),
        )


def _base64(values: "np.ndarray[tuple[int], np.dtype[np.generic]]") -> str:
    return base64.b64encode(values.tobytes()).decode()


def _joined(parts: list[Ints]) -> Ints:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])
