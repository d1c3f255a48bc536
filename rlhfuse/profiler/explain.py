"""One step of a trace, explained: attribution, schedule, what-ifs. The profiler's front door."""

from dataclasses import dataclass

from rlhfuse.profiler.clocks import align
from rlhfuse.profiler.recovery import Recovered, recover
from rlhfuse.profiler.stages import EARLY, MOVED, stage_what_ifs
from rlhfuse.profiler.summary import ProfileSummary, ScheduleSummary, WhatIf, summarize
from rlhfuse.profiler.table import SpanTable
from rlhfuse.profiler.trace import Trace
from rlhfuse.profiler.transfers import meetings, named_collectives, split
from rlhfuse.schedules.ir import Pipeline


@dataclass(frozen=True, slots=True)
class Explained:
    """One step on one clock, its training rounds, and everything there is to say about it."""

    table: SpanTable
    rounds: tuple[Recovered, ...]
    summary: ProfileSummary


def explain(
    trace: Trace,
    step: int | None,
    *,
    critic_scale: float | None = 1.0,
    critic: Pipeline | None = None,
) -> tuple[SpanTable, ProfileSummary]:
    """The step's spans, on one clock, and everything there is to say about it.

    Args:
        step: of `trace.steps`; None where it knows no steps.
        critic_scale: cost of a critic that single models are fused with, over the model's; None
            skips the what-ifs.
        critic: its costs, where they are known.
    """
    found = explain_step(trace, step, critic_scale=critic_scale, critic=critic)
    return found.table, found.summary


def explain_step(
    trace: Trace,
    step: int | None,
    *,
    critic_scale: float | None = 1.0,
    critic: Pipeline | None = None,
) -> Explained:
    """As `explain`, with the training rounds."""
    loaded = trace.load(step)
    aligned = align(loaded.timeline)
    pairs, unmatched = meetings(named_collectives(aligned.timeline))
    table = split(aligned.timeline, pairs)
    rounds, warnings = recover(table)
    told = [*loaded.warnings, *aligned.notes, *unmatched, *warnings]
    found, schedule = list(loaded.what_if), None
    if critic_scale is not None:
        found += stage_what_ifs(table, table.wall_s)
    if rounds:
        schedule, replayed, more = _replayed(rounds, table.wall_s, critic_scale, critic)
        found += replayed + _both(found, replayed, table.wall_s)
        told += more
    summary = summarize(
        trace.format,
        trace.steps,
        step,
        table,
        pipelines=loaded.pipelines,
        schedule=schedule,
        what_if=found,
        warnings=told,
    )
    return Explained(table, tuple(rounds), summary)


def _both(stages: list[WhatIf], training: list[WhatIf], wall_s: float) -> list[WhatIf]:
    """Both fusions at once: generation with scoring, and the two trainings."""
    names = {EARLY: "both fusions, migration off", MOVED: "both fusions, migration on, at best"}
    fused = next((w for w in training if w.name.startswith("both models fused")), None)
    found = []
    for what in stages if fused is not None else []:
        if what.name in names and fused is not None:
            step_s = what.makespan_s + fused.makespan_s - wall_s
            found.append(WhatIf(names[what.name], step_s, 1 - step_s / wall_s))
    return found


def _replayed(
    rounds: list[Recovered], wall_s: float, critic_scale: float | None, critic: Pipeline | None
) -> tuple[ScheduleSummary, list[WhatIf], list[str]]:
    from rlhfuse.profiler.what_if import Critic, describe, what_ifs  # loads the compiler

    if critic_scale is None:
        return describe(rounds), [], []
    found, told = what_ifs(rounds, wall_s, critic=Critic(critic_scale, critic))
    return describe(rounds), found, told
