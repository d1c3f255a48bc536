"""One step of a trace, explained: attribution, schedule, what-ifs. The profiler's front door."""

from rlhfuse.profiler.clocks import align
from rlhfuse.profiler.recovery import recover
from rlhfuse.profiler.summary import ProfileSummary, summarize
from rlhfuse.profiler.table import SpanTable
from rlhfuse.profiler.trace import Trace


def explain(
    trace: Trace, step: int | None, *, critic_scale: float | None = 1.0
) -> tuple[SpanTable, ProfileSummary]:
    """The step's timeline, on one clock, and everything there is to say about it.

    Args:
        step: of `trace.steps`; None where it knows no steps.
        critic_scale: cost of a critic that single models are fused with, over the model's; None
            skips the what-ifs.
    """
    loaded = trace.load(step)
    aligned = align(loaded.timeline)
    rounds, warnings = recover(aligned.timeline)
    told = [*loaded.warnings, *aligned.notes, *warnings]
    found, schedule = list(loaded.what_if), None
    if rounds:
        from rlhfuse.profiler.what_if import describe, what_ifs  # loads the compiler: a second

        schedule = describe(rounds)
        if critic_scale is not None:
            replayed, more = what_ifs(rounds, aligned.timeline.wall_s, critic_scale=critic_scale)
            found += replayed
            told += more
    summary = summarize(
        trace.format,
        trace.steps,
        step,
        aligned.timeline,
        pipelines=loaded.pipelines,
        schedule=schedule,
        what_if=found,
        warnings=told,
    )
    return aligned.timeline, summary
