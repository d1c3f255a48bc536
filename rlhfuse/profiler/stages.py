"""What if generation and scoring overlapped, or did not: the step's first stages by arithmetic.

A lane's scoring takes as long as it took, wherever it runs. With a barrier it begins when the last
sample is generated; without one, as soon as the lane generates no more; with migration the free
lanes share all of it. What follows the stages moves by as much as their end does.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhfuse.profiler.arrays import Floats
from rlhfuse.profiler.attribution import device_lanes
from rlhfuse.profiler.summary import WhatIf
from rlhfuse.profiler.table import SpanTable
from rlhfuse.timeline import Kind

_GENERATE = (Kind.GENERATE, Kind.PREFILL)
SERIAL = "generation, then scoring (no overlap)"
EARLY = "scoring begins in the long tail (migration off)"
MOVED = "scoring shared by all that are free (migration on, at best)"


@dataclass(frozen=True, slots=True)
class Rollout:
    """Per device: when it generated last, and its seconds of scoring; when both stages ended."""

    generated_s: Floats
    scoring_s: Floats
    end_s: float
    fused: bool  # some scoring ran before generation ended

    @property
    def last_s(self) -> float:
        return float(self.generated_s.max())

    def serial_s(self) -> float:
        return self.last_s + float(self.scoring_s.max())

    def early_s(self) -> float:
        return max(self.last_s, float((self.generated_s + self.scoring_s).max()))

    def moved_s(self) -> float:
        """The work poured onto the lanes, first free first, as water into vessels."""
        free = np.sort(self.generated_s)
        work = float(self.scoring_s.sum())
        levels = (np.cumsum(free) + work) / np.arange(1, len(free) + 1)
        fits = levels[:-1] <= free[1:]
        level = float(levels[int(np.argmax(fits))]) if fits.any() else float(levels[-1])
        return max(self.last_s, level)


def rollout_of(table: SpanTable) -> Rollout | None:
    """The step's generation and scoring; None where it has not both, or one lane alone: that has
    nothing to overlap with (or stands for a whole job)."""
    devices = set(device_lanes(table))
    if len(devices) < 2:
        return None
    here = np.array([lane in devices for lane in table.lanes])[table.lane]
    generates = here & table.is_kind(_GENERATE)
    scores = here & table.is_kind((Kind.SCORE,))
    if not generates.any() or not scores.any():
        return None
    places = [place for place, lane in enumerate(table.lanes) if lane in devices]
    begin = float(table.start_s[generates].min())
    generated = np.full(len(table.lanes), begin)
    np.maximum.at(generated, table.lane[generates], table.end_s[generates])
    lengths = np.where(scores, table.end_s - table.start_s, 0.0)
    scoring = np.bincount(table.lane, lengths, minlength=len(table.lanes)).astype(np.float64)
    last = float(table.end_s[generates].max())
    end = max(last, float(table.end_s[scores].max()))
    fused = bool((table.start_s[scores] < last).any())
    return Rollout(generated[places], scoring[places], end, fused)


def stage_what_ifs(table: SpanTable, wall_s: float) -> list[WhatIf]:
    """The step with its first stages arranged otherwise."""
    rollout = rollout_of(table)
    if rollout is None or wall_s <= 0:
        return []
    cases: Sequence[tuple[str, float]] = (
        [(SERIAL, rollout.serial_s())]
        if rollout.fused
        else [(EARLY, rollout.early_s()), (MOVED, rollout.moved_s())]
    )
    found = []
    for name, end_s in cases:
        # A serial step's scoring may itself be stretched by waits: those are not saved.
        usual_s = rollout.end_s if rollout.fused else max(rollout.serial_s(), rollout.last_s)
        step_s = wall_s + end_s - usual_s
        found.append(WhatIf(name, step_s, 1 - step_s / wall_s))
    return found
