"""Spans as columns: what attribution works on, so that a million of them cost under a second.

A `Timeline` is made of objects, which is right for a step of ours and too slow for the kernels of a
foreign trace. `SpanTable.of` turns one into the other; readers of large traces build tables.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhfuse.profiler.arrays import Bools, Codes, Floats, Ints
from rlhfuse.profiler.causes import CAUSE_OF_KIND, CODE, Cause
from rlhfuse.timeline import Kind, Span, Timeline, lane_order

KINDS = tuple(Kind)
KIND_CODE = {kind: code for code, kind in enumerate(KINDS)}
UNKNOWN = -1  # the cause of a wait that names none

# Where spans of one lane overlap, the higher rank is what the lane was doing: computing beats
# moving bytes (only *exposed* transfers count), and both beat waiting. Equal ranks: the inner one.
RANKS = 4
_RANK = {
    Kind.WAIT: 0,
    Kind.OTHER: 0,
    Kind.TRANSFER: 1,
    Kind.WEIGHTS: 2,
    Kind.SWAP: 2,
    Kind.MIGRATE: 2,
    Kind.CHECKPOINT: 2,
}
_RANK_OF_CODE = np.array([_RANK.get(kind, RANKS - 1) for kind in KINDS], dtype=np.int8)
_CAUSE_OF_CODE = np.array(
    [CODE[CAUSE_OF_KIND[kind]] if kind in CAUSE_OF_KIND else UNKNOWN for kind in KINDS],
    dtype=np.int8,
)

# What ``args["what"]`` may say: of a wait, what it waited for; of a transfer, what it was for.
_WAITS = {
    "reward": Cause.REWARD_WAIT,
    "weights": Cause.WEIGHT_SYNC,
    "checkpoint": Cause.CHECKPOINT_WAIT,
    "barrier": Cause.STAGE_WAIT,
    "long_tail": Cause.LONG_TAIL,
    "straggler": Cause.STRAGGLER,
    "upstream": Cause.UPSTREAM,
    "downstream": Cause.DOWNSTREAM,
}
_TRANSFERS = {"dp_sync": Cause.DP_SYNC}


@dataclass(frozen=True, slots=True)
class SpanTable:
    """Spans of one clock as columns of equal length; seconds.

    `cause` is what a lane's time in this span is given to where nothing covers it; of a wait that
    names no cause it is `UNKNOWN`. `rank` decides between spans that overlap. `source` holds the
    spans where the table was made from them.
    """

    lanes: tuple[str, ...]
    names: tuple[str, ...]
    lane: Ints
    start_s: Floats
    end_s: Floats
    kind: Codes
    cause: Codes
    rank: Codes
    name: Ints
    source: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.start_s)

    @staticmethod
    def of(timeline: "Timeline | SpanTable") -> "SpanTable":
        """The same spans as a table; a table stays what it is."""
        if isinstance(timeline, SpanTable):
            return timeline
        spans = timeline.spans
        lanes = timeline.lanes
        places = {lane: place for place, lane in enumerate(lanes)}
        names: dict[str, int] = {}
        count = len(spans)
        kind = np.fromiter((KIND_CODE[span.kind] for span in spans), np.int8, count)
        cause = _CAUSE_OF_CODE[kind]
        for index in np.flatnonzero((kind == _WAIT) | (kind == _TRANSFER)).tolist():
            known = _WAITS if kind[index] == _WAIT else _TRANSFERS
            named = known.get(str(spans[index].args.get("what", "")))
            if named is not None:
                cause[index] = CODE[named]
        return SpanTable(
            lanes,
            tuple(dict.fromkeys(span.name for span in spans)),
            np.fromiter((places[span.lane] for span in spans), np.int64, count),
            np.fromiter((span.start_s for span in spans), np.float64, count),
            np.fromiter((span.end_s for span in spans), np.float64, count),
            kind,
            cause,
            _RANK_OF_CODE[kind],
            np.fromiter((names.setdefault(s.name, len(names)) for s in spans), np.int64, count),
            spans,
        )

    @staticmethod
    def build(
        lanes: Sequence[str],
        names: Sequence[str],
        lane: Ints,
        start_s: Floats,
        end_s: Floats,
        kind: Codes,
        name: Ints,
    ) -> "SpanTable":
        """A table whose causes and ranks are those of its kinds."""
        cause, rank = _CAUSE_OF_CODE[kind], _RANK_OF_CODE[kind]
        return SpanTable(tuple(lanes), tuple(names), lane, start_s, end_s, kind, cause, rank, name)

    @property
    def begin_s(self) -> float:
        return float(self.start_s.min()) if len(self) else 0.0

    @property
    def finish_s(self) -> float:
        return float(self.end_s.max()) if len(self) else 0.0

    @property
    def wall_s(self) -> float:
        return self.finish_s - self.begin_s

    def is_kind(self, kinds: Iterable[Kind]) -> Bools:
        return np.isin(self.kind, [KIND_CODE[kind] for kind in kinds])

    def span(self, index: int) -> Span:
        if self.source:
            return self.source[index]
        return Span(
            self.lanes[self.lane[index]],
            float(self.start_s[index]),
            float(self.end_s[index]),
            KINDS[self.kind[index]],
            self.names[self.name[index]],
        )

    def spans(self, which: Bools | None = None) -> list[Span]:
        """Chosen spans (all by default) as objects."""
        chosen = np.arange(len(self)) if which is None else np.flatnonzero(which)
        return [self.span(index) for index in chosen.tolist()]

    def timeline(self) -> Timeline:
        return Timeline(self.source or tuple(self.spans()))

    def where(self, which: Bools) -> "SpanTable":
        """Chosen rows; lanes and names stay."""
        kept = tuple(self.spans(which)) if self.source else ()
        return replace(
            self,
            lane=self.lane[which],
            start_s=self.start_s[which],
            end_s=self.end_s[which],
            kind=self.kind[which],
            cause=self.cause[which],
            rank=self.rank[which],
            name=self.name[which],
            source=kept,
        )

    def moved(self, shift_s: Floats) -> "SpanTable":
        """The same table with `shift_s` [rows, 2] added to starts and ends."""
        start_s, end_s = self.start_s + shift_s[:, 0], self.end_s + shift_s[:, 1]
        source = tuple(
            Span(span.lane, start, end, span.kind, span.name, span.args)
            for span, start, end in zip(self.source, start_s.tolist(), end_s.tolist(), strict=False)
        )
        return replace(self, start_s=start_s, end_s=end_s, source=source)


_WAIT, _TRANSFER = KIND_CODE[Kind.WAIT], KIND_CODE[Kind.TRANSFER]


def stacked(tables: Sequence[SpanTable]) -> SpanTable:
    """Tables of one clock as one; lanes in natural order."""
    lanes = sorted({lane for table in tables for lane in table.lanes}, key=lane_order)
    places = {lane: place for place, lane in enumerate(lanes)}
    names: dict[str, int] = {}
    for table in tables:
        for name in table.names:
            names.setdefault(name, len(names))
    lane_of = [np.array([places[x] for x in t.lanes], dtype=np.int64) for t in tables]
    name_of = [np.array([names[x] for x in t.names], dtype=np.int64) for t in tables]
    return SpanTable(
        tuple(lanes),
        tuple(names),
        np.concatenate([m[t.lane] for m, t in zip(lane_of, tables, strict=True)]),
        np.concatenate([t.start_s for t in tables]),
        np.concatenate([t.end_s for t in tables]),
        np.concatenate([t.kind for t in tables]),
        np.concatenate([t.cause for t in tables]),
        np.concatenate([t.rank for t in tables]),
        np.concatenate([m[t.name] for m, t in zip(name_of, tables, strict=True)]),
        tuple(span for t in tables for span in t.source) if all(t.source for t in tables) else (),
    )
