"""Every second of every device of one RLHF step, given to exactly one cause.

Spans say what a lane did. What it did *not* do is explained from the others: who still generated,
scored, trained or moved weights at that moment, and, inside a training round, which task of which
peer the next task had to wait for. Pure: a timeline in, numbers out.
"""

import re
from collections.abc import Sequence

import msgspec

from rlhfuse.profiler.causes import CAUSES, IDLE, WORK, Cause
from rlhfuse.profiler.rounds import TRAINING_KINDS
from rlhfuse.profiler.segments import Grid, LaneSegments, all_segments
from rlhfuse.profiler.table import SpanTable
from rlhfuse.timeline import Span, Timeline

_DEVICE = re.compile(r"rank\d+")


class Segment(msgspec.Struct, frozen=True):
    """A lane's time from `start_s` to `end_s` has this cause; `span` is the work done, if any."""

    start_s: float
    end_s: float
    cause: Cause
    span: Span | None = None


class LaneAttribution(msgspec.Struct, frozen=True):
    """One lane's wall time by cause (seconds); the causes add up to `wall_s`, exactly."""

    lane: str
    wall_s: float
    causes: dict[Cause, float]

    @property
    def compute_s(self) -> float:
        return sum(self.causes.get(cause, 0.0) for cause in WORK)

    @property
    def idle_s(self) -> float:
        """Everything that is not compute, movement of bytes included."""
        return self.wall_s - self.compute_s

    @property
    def bubble_fraction(self) -> float:
        return self.idle_s / self.wall_s if self.wall_s > 0 else 0.0


class StepAttribution(msgspec.Struct, frozen=True):
    """All lanes of one step over one window of time."""

    start_s: float
    wall_s: float
    lanes: tuple[LaneAttribution, ...]

    @property
    def end_s(self) -> float:
        return self.start_s + self.wall_s

    @property
    def causes(self) -> dict[Cause, float]:
        """Device-seconds by cause, summed over lanes, in the order of `Cause`."""
        totals = {c: sum(lane.causes.get(c, 0.0) for lane in self.lanes) for c in Cause}
        return {cause: seconds for cause, seconds in totals.items() if seconds > 0}

    @property
    def bubble_fraction(self) -> float:
        """One minus compute over wall, mean over lanes."""
        return sum(x.bubble_fraction for x in self.lanes) / len(self.lanes) if self.lanes else 0.0

    @property
    def idle_fraction(self) -> float:
        """The share of device time in which nothing was computed and nothing moved."""
        total = self.wall_s * len(self.lanes)
        return sum(self.causes.get(c, 0.0) for c in IDLE) / total if total > 0 else 0.0

    def metrics(self) -> dict[str, float]:
        """``bubble/<cause>``: exclusive device-seconds; they add up to ``perf/device_s``."""
        values = {f"bubble/{cause.value}": seconds for cause, seconds in self.causes.items()}
        values["perf/device_s"] = self.wall_s * len(self.lanes)
        values["perf/bubble_fraction"] = self.bubble_fraction
        values["perf/idle_fraction"] = self.idle_fraction
        return values


def device_lanes(timeline: Timeline | SpanTable) -> tuple[str, ...]:
    """Lanes that are devices (``rank0`` ...); all lanes where none is called so."""
    lanes = timeline.lanes
    return tuple(lane for lane in lanes if _DEVICE.fullmatch(lane)) or lanes


def attribute(
    timeline: Timeline | SpanTable,
    *,
    lanes: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
) -> StepAttribution:
    """Give every second of every device to one cause.

    Args:
        timeline: one step. Lanes that are not devices (controller, reward services) explain the
            waiting of those that are.
        lanes: the lanes to explain; by default `device_lanes`.
        window: from when to when, in the timeline's seconds; by default all of it.
    """
    grid, rows = lane_segments(timeline, lanes=lanes, window=window)
    explained = tuple(
        LaneAttribution(lane, grid.wall_s, segments.seconds()) for lane, segments in rows.items()
    )
    return StepAttribution(grid.start_s, grid.wall_s, explained)


def lane_segments(
    timeline: Timeline | SpanTable,
    *,
    lanes: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
) -> tuple[Grid, dict[str, LaneSegments]]:
    """The pieces behind `attribute`, as columns, per lane; and the window they cover."""
    table = SpanTable.of(timeline)
    wanted = tuple(lanes) if lanes is not None else device_lanes(table)
    start_s, end_s = window if window is not None else (table.begin_s, table.finish_s)
    return all_segments(table, wanted, start_s, end_s)


def segments_by_lane(
    timeline: Timeline | SpanTable,
    *,
    lanes: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
) -> dict[str, tuple[Segment, ...]]:
    """The pieces behind `attribute` as objects: touching segments that cover the window."""
    table = SpanTable.of(timeline)
    grid, rows = lane_segments(table, lanes=lanes, window=window)
    return {lane: tuple(_objects(table, grid, segments)) for lane, segments in rows.items()}


def _objects(table: SpanTable, grid: Grid, segments: LaneSegments) -> list[Segment]:
    edges = (segments.edges_s + grid.start_s).tolist()
    causes, spans = segments.cause.tolist(), segments.span.tolist()
    return [
        Segment(edges[i], edges[i + 1], CAUSES[cause], table.span(span) if span >= 0 else None)
        for i, (cause, span) in enumerate(zip(causes, spans, strict=True))
    ]


__all__ = [
    "TRAINING_KINDS",
    "LaneAttribution",
    "Segment",
    "StepAttribution",
    "attribute",
    "device_lanes",
    "lane_segments",
    "segments_by_lane",
]
