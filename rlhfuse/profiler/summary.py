"""The summary that ``rlhfuse profile`` prints: one object, its field names are a contract."""

from collections.abc import Sequence

import msgspec

from rlhfuse.profiler.attribution import StepAttribution, attribute
from rlhfuse.profiler.table import SpanTable
from rlhfuse.timeline import Timeline


class RankSummary(msgspec.Struct, frozen=True):
    """One rank; `causes` (seconds) add up to `wall_s`."""

    rank: str
    wall_s: float
    compute_s: float
    idle_s: float
    bubble_fraction: float | None
    causes: dict[str, float]


class ScheduleSummary(msgspec.Struct, frozen=True):
    """The schedule that ran, as far as it was recovered; makespans in seconds, over its rounds."""

    name: str
    rounds: int
    pipelines: list[str]
    stages: list[int]
    microbatches: list[int]
    split_weight: bool
    makespan_s: float
    ideal_makespan_s: float
    stragglers: list[str]


class WhatIf(msgspec.Struct, frozen=True):
    """The step under another condition; `saving_fraction` of the wall time it is compared with.

    `bubble_recovered`: what is saved as a share of the bubble; over 1 where the work itself would
    be shorter, null where the bubble is not known or there is none.
    """

    name: str
    makespan_s: float
    saving_fraction: float
    bubble_recovered: float | None = None


class ProfileSummary(msgspec.Struct, frozen=True):
    """What ``rlhfuse profile --json`` prints. `bubble_fraction` is null where pipeline work could
    not be told from other work."""

    format: str
    num_ranks: int
    steps: list[int]
    step: int | None
    wall_s: float
    bubble_fraction: float | None
    causes: dict[str, float]
    per_rank: list[RankSummary]
    schedule: ScheduleSummary | None = None
    what_if: list[WhatIf] = []
    warnings: list[str] = []

    @property
    def what_if_note(self) -> str:
        """What a reader of `what_if` may stumble over; else empty."""
        if any((what.bubble_recovered or 0.0) > 1.0 for what in self.what_if):
            return "over 100 % of the bubble: the work itself gets shorter too"
        return ""


def summarize(
    format_name: str,
    steps: Sequence[int],
    step: int | None,
    timeline: Timeline | SpanTable,
    *,
    pipelines: bool = True,
    schedule: ScheduleSummary | None = None,
    what_if: Sequence[WhatIf] = (),
    warnings: Sequence[str] = (),
) -> ProfileSummary:
    """Attribute a step's timeline and put everything in the contract's form.

    `pipelines`: whether its spans tell pipeline work from other work.
    """
    explained = attribute(timeline)
    bubble = explained.bubble_fraction if pipelines else None
    return ProfileSummary(
        format=format_name,
        num_ranks=len(explained.lanes),
        steps=list(steps),
        step=step,
        wall_s=explained.wall_s,
        bubble_fraction=bubble,
        causes={cause.value: seconds for cause, seconds in explained.causes.items()},
        per_rank=_ranks(explained, pipelines),
        schedule=schedule,
        what_if=[of_bubble(what, bubble) for what in what_if],
        warnings=list(warnings),
    )


def of_bubble(what: WhatIf, bubble_fraction: float | None) -> WhatIf:
    """With the share of the bubble that it recovers; both are shares of the same wall time."""
    share = what.saving_fraction / bubble_fraction if bubble_fraction else None
    return msgspec.structs.replace(what, bubble_recovered=share)


def _ranks(explained: StepAttribution, pipelines: bool) -> list[RankSummary]:
    return [
        RankSummary(
            rank=lane.lane.removeprefix("rank"),
            wall_s=lane.wall_s,
            compute_s=lane.compute_s,
            idle_s=lane.idle_s,
            bubble_fraction=lane.bubble_fraction if pipelines else None,
            causes={cause.value: seconds for cause, seconds in lane.causes.items()},
        )
        for lane in explained.lanes
    ]
