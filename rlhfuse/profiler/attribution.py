"""Every second of every device of one RLHF step, given to exactly one cause.

Spans say what a lane did. What it did *not* do is explained from the others: who still generated,
scored, trained or moved weights at that moment, and, inside a training round, which task of which
peer the next task had to wait for. Pure: a timeline in, numbers out.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import msgspec

from rlhfuse.profiler.causes import CAUSE_OF_KIND, IDLE, WORK, Cause
from rlhfuse.profiler.intervals import Piece, Union, paint
from rlhfuse.profiler.rounds import TRAINING_KINDS, Round, find_rounds
from rlhfuse.timeline import Kind, Span, Timeline

_DEVICE = re.compile(r"rank\d+")
_GENERATION_KINDS = frozenset({Kind.GENERATE, Kind.PREFILL})


class Segment(msgspec.Struct, frozen=True):
    """A lane's time from `start_s` to `end_s` has this cause; `span` is the work done, if any."""

    start_s: float
    end_s: float
    cause: Cause
    span: Span | None = None


class LaneAttribution(msgspec.Struct, frozen=True):
    """One lane's wall time by cause (seconds); the causes add up to `wall_s`."""

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
    end_s: float
    lanes: tuple[LaneAttribution, ...]

    @property
    def wall_s(self) -> float:
        return self.end_s - self.start_s

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


def device_lanes(timeline: Timeline) -> tuple[str, ...]:
    """Lanes that are devices (``rank0`` ...); all lanes where none is called so."""
    lanes = timeline.lanes
    return tuple(lane for lane in lanes if _DEVICE.fullmatch(lane)) or lanes


def attribute(
    timeline: Timeline,
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
    start_s, end_s = window if window is not None else (timeline.start_s, timeline.end_s)
    explained = []
    for lane, segments in segments_by_lane(timeline, lanes=lanes, window=(start_s, end_s)).items():
        causes: dict[Cause, float] = {}
        for segment in segments:
            causes[segment.cause] = causes.get(segment.cause, 0.0) + segment.end_s - segment.start_s
        explained.append(LaneAttribution(lane, end_s - start_s, causes))
    return StepAttribution(start_s, end_s, tuple(explained))


def segments_by_lane(
    timeline: Timeline,
    *,
    lanes: Sequence[str] | None = None,
    window: tuple[float, float] | None = None,
) -> dict[str, tuple[Segment, ...]]:
    """The pieces behind `attribute`: per lane, touching segments that cover the window."""
    start_s, end_s = window if window is not None else (timeline.start_s, timeline.end_s)
    wanted = tuple(lanes) if lanes is not None else device_lanes(timeline)
    by_lane: dict[str, list[Span]] = {lane: [] for lane in wanted}
    for span in sorted(timeline.spans, key=lambda span: (span.start_s, span.end_s)):
        if span.lane in by_lane:
            by_lane[span.lane].append(span)
    context = _Context.of(timeline, wanted)
    return {
        lane: tuple(_merged(_explain(lane, spans, context, start_s, end_s)))
        for lane, spans in by_lane.items()
    }


@dataclass(frozen=True)
class _Context:
    """What the whole step looked like: who did what when."""

    generation: tuple[float, float]  # first start to last end over all devices
    last_generated_s: dict[str, float]
    early_scoring: bool  # some scoring ran before generation ended
    scoring_after_s: dict[str, float]  # seconds of scoring that each lane did after generation
    rounds: tuple[Round, ...]
    rewarding: Union
    syncing: Union
    saving: Union
    staging: Union  # scoring, optimizer or training of others: a stage is not over
    kernels_s: dict[str, tuple[float, float]]  # of traces of kernels: first start, last end

    @staticmethod
    def of(timeline: Timeline, lanes: Sequence[str]) -> "_Context":
        devices = frozenset(lanes)
        on_devices = [span for span in timeline.spans if span.lane in devices]
        generating = [span for span in on_devices if span.kind in _GENERATION_KINDS]
        begin = min((span.start_s for span in generating), default=0.0)
        finish = max((span.end_s for span in generating), default=0.0)
        last: dict[str, float] = {}
        for span in generating:
            last[span.lane] = max(last.get(span.lane, begin), span.end_s)
        after: dict[str, float] = {}
        early = False
        for span in on_devices:
            if span.kind is Kind.SCORE:
                early = early or span.start_s < finish
                after[span.lane] = after.get(span.lane, 0.0) + max(0.0, span.end_s - finish)
        rounds = find_rounds(on_devices)
        staging = _covered(on_devices, {Kind.SCORE, Kind.OPTIMIZER, Kind.ADVANTAGE})
        return _Context(
            generation=(begin, finish),
            last_generated_s=last,
            early_scoring=early,
            scoring_after_s=after,
            rounds=rounds,
            rewarding=Union(_covered(timeline.spans, {Kind.REWARD})),
            syncing=Union(_covered(timeline.spans, {Kind.WEIGHTS, Kind.SWAP})),
            saving=Union(_covered(timeline.spans, {Kind.CHECKPOINT})),
            staging=Union([*staging, *((r.start_s, r.end_s) for r in rounds)]),
            kernels_s=_extents(span for span in on_devices if span.kind is Kind.COMPUTE),
        )

    def cuts(self, lane: str) -> list[float]:
        """Moments at which the explanation of a lane's idle time may change, in order."""
        moments = {*self.generation, *self.kernels_s.get(lane, ())}
        if lane in self.last_generated_s:
            moments.add(self.last_generated_s[lane])
        for training in self.rounds:
            moments.update(training.edges(lane))
        for union in (self.rewarding, self.syncing, self.saving, self.staging):
            moments.update(union.starts, union.ends)
        return sorted(moments)


def _extents(spans: Iterable[Span]) -> dict[str, tuple[float, float]]:
    found: dict[str, tuple[float, float]] = {}
    for span in spans:
        start_s, end_s = found.get(span.lane, (span.start_s, span.end_s))
        found[span.lane] = (min(start_s, span.start_s), max(end_s, span.end_s))
    return found


def _covered(spans: Iterable[Span], kinds: set[Kind]) -> list[tuple[float, float]]:
    return [(span.start_s, span.end_s) for span in spans if span.kind in kinds]


def _explain(
    lane: str, spans: Sequence[Span], context: _Context, start_s: float, end_s: float
) -> Iterator[Segment]:
    """Segments of one lane from `start_s` to `end_s`, in order, without a gap."""
    # A barrier between generation and scoring hides work that this lane could have done: the
    # first so many seconds of its tail are the barrier's fault, not the tail's.
    ready_s = 0.0 if context.early_scoring else context.scoring_after_s.get(lane, 0.0)
    cuts = context.cuts(lane)
    for piece in paint(spans, start_s, end_s):
        if piece.span is not None and piece.span.kind is not Kind.WAIT:
            cause = CAUSE_OF_KIND[piece.span.kind]
            yield Segment(piece.start_s, piece.end_s, cause, piece.span)
            continue
        inside = cuts[bisect_right(cuts, piece.start_s) : bisect_left(cuts, piece.end_s)]
        for left, right in pairwise([piece.start_s, *inside, piece.end_s]):
            part = Piece(left, right, piece.span)
            for segment in _explain_idle(lane, part, context):
                if segment.cause is Cause.LONG_TAIL and ready_s > 0:
                    held = min(ready_s, right - left)
                    ready_s -= held
                    yield Segment(left, left + held, Cause.STAGE_WAIT)
                    yield Segment(left + held, right, Cause.LONG_TAIL)
                else:
                    yield segment


def _explain_idle(lane: str, part: Piece, context: _Context) -> Iterator[Segment]:
    """Explain idle time that no edge of the context cuts."""
    middle = (part.start_s + part.end_s) / 2
    for training in context.rounds:
        if training.start_s <= middle < training.end_s and training.has(lane):
            yield from (
                Segment(*piece)
                for piece in training.explain(lane, part.start_s, part.end_s, part.span)
            )
            return
    yield Segment(part.start_s, part.end_s, _outside_training(lane, middle, part.span, context))


def _outside_training(lane: str, time_s: float, wait: Span | None, context: _Context) -> Cause:
    named = _WAIT_CAUSES.get(str(wait.args.get("what", ""))) if wait is not None else None
    if named is not None:
        return named
    begin, finish = context.generation
    if begin <= time_s < finish:
        own_end = context.last_generated_s.get(lane, begin)
        return Cause.HOST_GAP if time_s < own_end else Cause.LONG_TAIL
    if context.rewarding.covers(time_s):
        return Cause.REWARD_WAIT
    if context.syncing.covers(time_s):
        return Cause.WEIGHT_SYNC
    if context.saving.covers(time_s):
        return Cause.CHECKPOINT_WAIT
    if context.staging.covers(time_s):
        return Cause.STAGE_WAIT
    first_s, last_s = context.kernels_s.get(lane, (0.0, 0.0))
    return Cause.HOST_GAP if first_s <= time_s < last_s else Cause.CONTROLLER


# What a wait span may say in ``args["what"]`` to name its cause outside of training rounds.
_WAIT_CAUSES = {
    "reward": Cause.REWARD_WAIT,
    "weights": Cause.WEIGHT_SYNC,
    "checkpoint": Cause.CHECKPOINT_WAIT,
    "barrier": Cause.STAGE_WAIT,
}


def _merged(segments: Iterable[Segment]) -> Iterator[Segment]:
    """Touching segments of one cause and one span as one; empty ones dropped."""
    held: Segment | None = None
    for segment in segments:
        if segment.end_s <= segment.start_s:
            continue
        if held is not None and held.cause is segment.cause and held.span is segment.span:
            held = Segment(held.start_s, segment.end_s, held.cause, held.span)
        else:
            if held is not None:
                yield held
            held = segment
    if held is not None:
        yield held


__all__ = [
    "TRAINING_KINDS",
    "LaneAttribution",
    "Segment",
    "StepAttribution",
    "attribute",
    "device_lanes",
    "segments_by_lane",
]
