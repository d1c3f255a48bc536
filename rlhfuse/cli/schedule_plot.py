"""A schedule as a picture: one row per rank, memory below."""

from pathlib import Path

from rlhfuse.schedules.ir import Op, Schedule
from rlhfuse.schedules.timing import simulate
from rlhfuse.timeline import Timeline

# Per pipeline: forward, backward (or input gradient), weight gradient; from light to dark.
_COLOURS = (
    ("#9ecae1", "#4292c6", "#08519c"),
    ("#fdd0a2", "#fd8d3c", "#a63603"),
    ("#c7e9c0", "#74c476", "#006d2c"),
    ("#dadaeb", "#9e9ac8", "#54278f"),
)
_MOST_NUMBERS = 6000  # tasks; beyond, micro-batch numbers would only be ink


def save_plot(schedule: Schedule, path: Path) -> None:
    """Write the schedule as PNG or SVG, by the ending of `path`: bubbles are left white."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    timeline = simulate(schedule)
    ranks = schedule.problem.num_ranks
    figure = Figure(figsize=(18, 2.5 + 0.42 * ranks), layout="constrained")
    FigureCanvasAgg(figure)
    rows, memory = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [max(3, ranks), 3]}
    )
    names = [pipe.name for pipe in schedule.problem.pipelines]
    number = len(timeline.spans) <= _MOST_NUMBERS
    wide = timeline.end_s / 220
    for (rank, _, task), span in zip(schedule.tasks(), timeline.spans, strict=True):
        shade = {Op.F: 0, Op.B: 1, Op.I: 1, Op.W: 2}[task.op]
        colour = _COLOURS[names.index(task.pipeline) % len(_COLOURS)][shade]
        rows.broken_barh(
            [(span.start_s, span.duration_s)],
            (rank - 0.45, 0.9),
            facecolor=colour,
            edgecolor="white",
            linewidth=0.4,
        )
        if number and span.duration_s >= wide:
            rows.text(
                span.start_s + span.duration_s / 2,
                rank,
                str(task.microbatch),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if shade == 2 else "black",
            )
    rows.set_ylim(ranks - 0.5, -0.5)
    rows.set_yticks(range(ranks), [f"rank {r}" for r in range(ranks)])
    rows.legend(
        handles=[
            Patch(color=_COLOURS[i % len(_COLOURS)][shade], label=f"{name} {label}")
            for i, name in enumerate(names)
            for shade, label in enumerate(("F", "B / I", "W"))
        ],
        ncols=3 * len(names),
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        fontsize=8,
        frameon=False,
    )
    for rank in range(ranks):
        times, levels = memory_curve(schedule, timeline, rank)
        memory.step(times, levels, where="post", linewidth=0.8, label=f"rank {rank}")
    if schedule.problem.memory_cap is not None:
        memory.axhline(schedule.problem.memory_cap, color="black", linestyle="--", linewidth=0.8)
    memory.set_ylabel("memory")
    memory.set_xlabel("time")
    memory.set_xlim(0, timeline.end_s)
    figure.savefig(path, dpi=130)


def memory_curve(
    schedule: Schedule, timeline: Timeline, rank: int
) -> tuple[list[float], list[float]]:
    """Times at which a rank's memory changes, and its level from then on."""
    changes: dict[float, float] = {0.0: 0.0}
    for (home, _, task), span in zip(schedule.tasks(), timeline.spans, strict=True):
        if home == rank:
            pipe = schedule.problem.pipeline(task.pipeline)
            claim, change = pipe.memory_change(task.op, task.pp_stage, task.microbatch)
            changes[span.start_s] = changes.get(span.start_s, 0.0) + claim
            changes[span.end_s] = changes.get(span.end_s, 0.0) + change
    times, levels, held = sorted(changes), [], 0.0
    for moment in times:
        held += changes[moment]
        levels.append(held)
    return times, levels
