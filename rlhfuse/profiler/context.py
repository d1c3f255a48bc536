"""What a whole step looked like, who did what when: by this the waiting of each is explained."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.profiler.arrays import Bools, Floats
from rlhfuse.profiler.intervals import Union
from rlhfuse.profiler.rounds import TRAINING_KINDS, Round, find_rounds
from rlhfuse.profiler.table import SpanTable
from rlhfuse.timeline import Kind

_GENERATION_KINDS = (Kind.GENERATE, Kind.PREFILL)
_STAGE_KINDS = (Kind.SCORE, Kind.OPTIMIZER, Kind.ADVANTAGE)


@dataclass(frozen=True, slots=True)
class Context:
    """Times are seconds of the timeline."""

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
    def of(table: SpanTable, lanes: Sequence[str]) -> "Context":
        """`lanes` are the devices; other lanes only explain."""
        known = frozenset(lanes)
        is_device = np.array([lane in known for lane in table.lanes], dtype=np.bool_)
        here = is_device[table.lane] if len(table) else np.zeros(0, dtype=np.bool_)
        generating = here & table.is_kind(_GENERATION_KINDS)
        extents = _extents(table, generating)
        begin = min((start for start, _ in extents.values()), default=0.0)
        finish = max((end for _, end in extents.values()), default=0.0)
        scoring = here & table.is_kind((Kind.SCORE,))
        after = np.maximum(0.0, table.end_s - np.maximum(table.start_s, finish)) * scoring
        held = np.bincount(table.lane, after, minlength=len(table.lanes))
        rounds = find_rounds(table.spans(here & table.is_kind((*TRAINING_KINDS, Kind.OPTIMIZER))))
        return Context(
            generation=(begin, finish),
            last_generated_s={lane: end for lane, (_, end) in extents.items()},
            early_scoring=bool((scoring & (table.start_s < finish)).any()),
            scoring_after_s=dict(zip(table.lanes, held.tolist(), strict=True)),
            rounds=rounds,
            rewarding=_union(table, table.is_kind((Kind.REWARD,))),
            syncing=_union(table, table.is_kind((Kind.WEIGHTS, Kind.SWAP))),
            saving=_union(table, table.is_kind((Kind.CHECKPOINT,))),
            staging=_staging(table, here & table.is_kind(_STAGE_KINDS), rounds),
            kernels_s=_extents(table, here & table.is_kind((Kind.COMPUTE,))),
        )

    def cuts(self, lane: str) -> Floats:
        """Moments at which the explanation of a lane's idle time may change."""
        moments = [*self.generation, *self.kernels_s.get(lane, ())]
        if lane in self.last_generated_s:
            moments.append(self.last_generated_s[lane])
        edges = [np.array(moments)]
        edges += [
            union.edges for union in (self.rewarding, self.syncing, self.saving, self.staging)
        ]
        edges += [training.edges(lane) for training in self.rounds]
        return np.concatenate(edges)


def _union(table: SpanTable, which: Bools) -> Union:
    return Union.of(table.start_s[which], table.end_s[which])


def _staging(table: SpanTable, which: Bools, rounds: Sequence[Round]) -> Union:
    starts = np.array([training.start_s for training in rounds])
    ends = np.array([training.end_s for training in rounds])
    return Union.of(
        np.concatenate([table.start_s[which], starts]), np.concatenate([table.end_s[which], ends])
    )


def _extents(table: SpanTable, which: Bools) -> dict[str, tuple[float, float]]:
    """First start and last end of the chosen spans, per lane that has any."""
    lanes, starts, ends = table.lane[which], table.start_s[which], table.end_s[which]
    found = {}
    for place in np.unique(lanes).tolist():
        mine = lanes == place
        found[table.lanes[place]] = (float(starts[mine].min()), float(ends[mine].max()))
    return found
