"""Spans and timelines: one record for everything predicted and everything measured.

The simulator, the executor, the profiler and foreign traces all speak this format, so any claim
can be held against a run. A *lane* is one device (``rank0``, ``rank1``, ...); times are seconds
from the timeline's own zero.
"""

import gzip
from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path

import msgspec

ArgValue = int | float | str


class Kind(StrEnum):
    """What a lane was doing during a span. Anything not covered by a span is idle."""

    F = "F"  # training: forward of one micro-batch on one pipeline stage
    B = "B"  # training: full backward
    I = "I"  # noqa: E741  training: input gradient (torch's letter)
    W = "W"  # training: weight gradient
    GENERATE = "generate"
    PREFILL = "prefill"
    SCORE = "score"  # reference, critic, reward and old-log-probability inference
    REWARD = "reward"  # reward functions and services
    MIGRATE = "migrate"
    WEIGHTS = "weights"  # weight transfer into engines and scorers
    SWAP = "swap"  # sleep, wake, model swap-in and -out
    ADVANTAGE = "advantage"
    OPTIMIZER = "optimizer"
    CHECKPOINT = "checkpoint"
    TRANSFER = "transfer"  # point-to-point or collective communication
    WAIT = "wait"  # blocked on a named peer or event
    COMPUTE = "compute"  # of unknown purpose: kernels of foreign traces
    OTHER = "other"


class Span(msgspec.Struct, frozen=True):
    """`lane` was busy with `kind` from `start_s` to `end_s` (seconds)."""

    lane: str
    start_s: float
    end_s: float
    kind: Kind
    name: str
    args: dict[str, ArgValue] = {}

    @property
    def duration_s(self) -> float:
        return self.end_s - self.start_s


class Timeline(msgspec.Struct, frozen=True):
    """A set of spans. Spans of one lane may nest or overlap only if their kinds say so."""

    spans: tuple[Span, ...]

    @property
    def lanes(self) -> tuple[str, ...]:
        """Lane names in natural order (`rank2` before `rank10`)."""
        return tuple(sorted({span.lane for span in self.spans}, key=lane_order))

    @property
    def start_s(self) -> float:
        return min((span.start_s for span in self.spans), default=0.0)

    @property
    def end_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    @property
    def wall_s(self) -> float:
        return self.end_s - self.start_s

    def of_lane(self, lane: str) -> tuple[Span, ...]:
        """Spans of one lane by start time."""
        mine = (span for span in self.spans if span.lane == lane)
        return tuple(sorted(mine, key=lambda span: (span.start_s, span.end_s)))

    def of_kinds(self, kinds: Iterable[Kind]) -> "Timeline":
        wanted = frozenset(kinds)
        return Timeline(tuple(span for span in self.spans if span.kind in wanted))

    def busy_s(self, lane: str) -> float:
        """Seconds of `lane` covered by at least one span that is not a wait."""
        covered, reach = 0.0, float("-inf")
        for span in self.of_lane(lane):
            if span.kind is Kind.WAIT or span.end_s <= reach:
                continue
            covered += span.end_s - max(span.start_s, reach)
            reach = span.end_s
        return covered

    def shifted(self, offset_s: float) -> "Timeline":
        """The same timeline with every time moved by `offset_s`."""
        moved = (
            msgspec.structs.replace(
                span, start_s=span.start_s + offset_s, end_s=span.end_s + offset_s
            )
            for span in self.spans
        )
        return Timeline(tuple(moved))

    @staticmethod
    def merged(timelines: Sequence["Timeline"]) -> "Timeline":
        """All spans of timelines that share one clock, by start time."""
        spans = [span for timeline in timelines for span in timeline.spans]
        return Timeline(tuple(sorted(spans, key=lambda span: (span.start_s, span.lane))))


class _ChromeEvent(msgspec.Struct, omit_defaults=True):
    """One entry of the Chrome trace event format; times in microseconds."""

    ph: str
    name: str
    pid: int
    tid: int
    ts: float = 0.0
    dur: float = 0.0
    cat: str = ""
    args: dict[str, ArgValue] = {}


class _ChromeTrace(msgspec.Struct):
    traceEvents: list[_ChromeEvent]  # the format's own spelling
    displayTimeUnit: str = "ms"


def save_chrome(timeline: Timeline, path: Path) -> None:
    """Write Chrome trace JSON (opens in Perfetto), gzipped when `path` ends in ``.gz``."""
    pids = {lane: index for index, lane in enumerate(timeline.lanes)}
    events = [
        _ChromeEvent("M", "process_name", pid, 0, args={"name": lane}) for lane, pid in pids.items()
    ]
    events += [
        _ChromeEvent(
            "X",
            span.name,
            pids[span.lane],
            0,
            ts=span.start_s * 1e6,
            dur=span.duration_s * 1e6,
            cat=span.kind.value,
            args=dict(span.args),
        )
        for span in timeline.spans
    ]
    data = msgspec.json.encode(_ChromeTrace(events))
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def load_chrome(path: Path) -> Timeline:
    """Read what `save_chrome` wrote. Foreign traces are the profiler's business.

    Raises:
        ValueError: the file is not a Chrome trace written by rlhfuse.
    """
    data = path.read_bytes()
    try:
        raw = gzip.decompress(data) if path.suffix == ".gz" else data
        trace = msgspec.json.decode(raw, type=_ChromeTrace)
        lanes = {e.pid: str(e.args["name"]) for e in trace.traceEvents if e.ph == "M"}
        spans = tuple(
            Span(lanes[e.pid], e.ts / 1e6, (e.ts + e.dur) / 1e6, Kind(e.cat), e.name, dict(e.args))
            for e in trace.traceEvents
            if e.ph == "X"
        )
    except (msgspec.DecodeError, KeyError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{path} is not a timeline written by rlhfuse: {error}") from error
    return Timeline(spans)


def lane_order(lane: str) -> tuple[str, int, str]:
    """Natural order of lanes: `rank2` before `rank10`."""
    head = lane.rstrip("0123456789")
    digits = lane[len(head) :]
    return (head, int(digits) if digits else -1, lane)
