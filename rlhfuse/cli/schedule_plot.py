"""A schedule as a picture: one row per rank, the causes of idle time, memory below."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhfuse.schedules.critical import Bubble, critical_path, idle_spans, rank_times, total_bubbles
from rlhfuse.schedules.ir import Op, Schedule, Task
from rlhfuse.schedules.timing import simulate
from rlhfuse.timeline import Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Per pipeline: forward, backward (or input gradient), weight gradient; from light to dark.
_COLOURS = (
    ("#a6cbe8", "#4a90c9", "#124d86"),
    ("#fcd0a1", "#f5923e", "#a8480c"),
    ("#c3e6c0", "#66b96a", "#1b6b33"),
    ("#d9d4ec", "#9a8ac6", "#54378c"),
    ("#f8c9d8", "#e0759b", "#99274f"),
    ("#d5d5cf", "#9b9b90", "#55554b"),
)
_SHADE = {Op.F: 0, Op.B: 1, Op.I: 1, Op.W: 2}
_IDLE = {
    Bubble.WARM_UP: "#f1f1f1",
    Bubble.COOL_DOWN: "#f1f1f1",
    Bubble.DEPENDENCY: "#f7d6d6",
    Bubble.LINK: "#fdf3b4",
    Bubble.MEMORY: "#e3b7e8",
}
_MOST_NUMBERS = 8000  # tasks; beyond, micro-batch numbers would only be ink
_DPI = 130
_INK = "#222222"


def save_plot(schedule: Schedule, path: Path, headline: str = "") -> None:
    """Write the schedule as PNG or SVG, by the ending of `path`.

    Tasks are coloured by pipeline and operation and carry their micro-batch's number; idle time is
    tinted by its cause; a dark line under tasks marks the critical path.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timeline = simulate(schedule)
    ranks = schedule.problem.num_ranks
    longest = max((len(row) for row in schedule.rows), default=1)
    width = min(34.0, max(12.0, 2.0 + 0.135 * longest))
    bars, below = max(1.2, 0.4 * ranks), 1.3 + 0.03 * ranks
    figure = Figure(figsize=(width, bars + below + 1.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, memory = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [bars, below]})
    _draw_rows(top, schedule, timeline, width)
    marks = _draw_marks(top, schedule)
    _draw_legend(top, schedule, headline, marks, columns=int(width / 1.45))
    _draw_memory(memory, schedule, timeline)
    memory.set_xlim(0, timeline.end_s or 1.0)
    figure.savefig(path, dpi=_DPI)


def _draw_rows(axes: "Axes", schedule: Schedule, timeline: Timeline, width: float) -> None:
    """Bars of all tasks; idle time behind them; numbers where they fit."""
    from matplotlib.collections import PolyCollection

    ranks = schedule.problem.num_ranks
    for rank, time in enumerate(rank_times(schedule)):
        busy = 1 - time.idle / timeline.end_s if timeline.end_s else 1.0
        axes.text(
            1.004,
            rank,
            f"{100 * busy:.0f} %",
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=_INK,
        )
    boxes: dict[str, list[list[tuple[float, float]]]] = {}
    for idle in idle_spans(schedule):
        boxes.setdefault(_IDLE[idle.cause], []).append(_box(idle.start, idle.end, idle.rank, 0.46))
    for rank, task, span in _placed(schedule, timeline):
        boxes.setdefault(_colour(schedule, task), []).append(
            _box(span.start_s, span.end_s, rank, 0.43)
        )
    for colour, shapes in boxes.items():
        pause = colour in _IDLE.values()
        collection = PolyCollection(
            shapes, facecolor=colour, edgecolor="none" if pause else "white", linewidth=0.35
        )
        collection.set_zorder(1 if pause else 2)
        axes.add_collection(collection)
    path = critical_path(schedule)
    axes.hlines(
        [step.rank + 0.465 for step in path],
        [step.start for step in path],
        [step.end for step in path],
        color=_INK,
        linewidth=1.4,
        zorder=3,
    )
    _number(axes, schedule, timeline, width)
    axes.text(1.004, -0.8, "busy", transform=axes.get_yaxis_transform(), fontsize=8, color=_INK)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelbottom=False)
    axes.spines[:].set_visible(False)


def _number(axes: "Axes", schedule: Schedule, timeline: Timeline, width: float) -> None:
    if len(timeline.spans) > _MOST_NUMBERS:
        return
    points = (width - 1.6) * 72 / (timeline.end_s or 1.0)  # per unit of time
    for rank, task, span in _placed(schedule, timeline):
        digits, room = len(str(task.microbatch)), span.duration_s * points - 1.0
        size = min(7.0, room / (0.62 * digits))
        if size >= 3.2:
            axes.text(
                span.start_s + span.duration_s / 2,
                rank,
                str(task.microbatch),
                ha="center",
                va="center_baseline",
                fontsize=size,
                color="white" if task.op is Op.W else _INK,
                clip_on=True,
                in_layout=False,  # thousands of them: measuring each takes seconds
            )


def _draw_marks(axes: "Axes", schedule: Schedule) -> list["Line2D"]:
    """Release times and deadlines as vertical lines; their entries for the legend."""
    marks = []
    for pipe in schedule.problem.pipelines:
        colour = _palette(schedule, pipe.name)[2]
        for at, what, style in ((pipe.release, "release", ":"), (pipe.deadline, "deadline", "--")):
            if at:
                line = axes.axvline(at, color=colour, linestyle=style, linewidth=1.3, zorder=4)
                line.set_label(f"{pipe.name} {what}")
                marks.append(line)
    return marks


def _draw_legend(
    axes: "Axes", schedule: Schedule, headline: str, marks: list["Line2D"], columns: int
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    ops = {(task.pipeline, _SHADE[task.op], task.op) for _, _, task in schedule.tasks()}
    handles: list[Patch | Line2D] = [
        Patch(color=_palette(schedule, name)[shade], label=f"{name} {op.value}")
        for name in (pipe.name for pipe in schedule.problem.pipelines)
        for pipeline, shade, op in sorted(ops, key=lambda entry: (entry[1], entry[2]))
        if pipeline == name
    ]
    times = rank_times(schedule)
    whole = sum(time.busy + time.idle for time in times) or 1.0
    totals = total_bubbles(times)
    edges = totals[Bubble.WARM_UP.value] + totals[Bubble.COOL_DOWN.value]
    shares = [("warm-up, cool-down", edges, _IDLE[Bubble.WARM_UP])]
    shares += [
        (cause.value, totals[cause.value], colour)
        for cause, colour in _IDLE.items()
        if cause not in (Bubble.WARM_UP, Bubble.COOL_DOWN)
    ]
    handles += [
        Patch(facecolor=colour, edgecolor="#bbbbbb", label=f"idle: {name} {share / whole:.1%}")
        for name, share, colour in shares
        if share > 0
    ]
    handles += marks
    handles.append(Line2D([], [], color=_INK, linewidth=1.4, label="critical path"))
    axes.legend(
        handles=handles,
        ncols=min(len(handles), columns),
        loc="lower left",
        bbox_to_anchor=(0.0, 1.0),
        fontsize=8,
        frameon=False,
        handlelength=1.2,
        columnspacing=1.2,
        borderaxespad=0.2,
    )
    if headline:
        lines = -(-len(handles) // columns)
        axes.set_title(headline, loc="left", fontsize=11, color=_INK, pad=10 + 13 * lines)


def _draw_memory(axes: "Axes", schedule: Schedule, timeline: Timeline) -> None:
    """All ranks' curves thin and grey, the one with the highest peak in colour, and the cap."""
    curves = [memory_curve(schedule, timeline, rank) for rank in range(schedule.problem.num_ranks)]
    peaks = [max(levels) for _, levels in curves]
    highest = peaks.index(max(peaks))
    for times, levels in curves:
        axes.step(times, levels, where="post", linewidth=0.5, color="#b9bec6", zorder=1)
    times, levels = curves[highest]
    axes.step(times, levels, where="post", linewidth=1.3, color="#7b3294", zorder=3)
    axes.fill_between(times, levels, step="post", color="#7b3294", alpha=0.10, linewidth=0)
    cap = schedule.problem.memory_cap
    notes = [(peaks[highest], f"peak {peaks[highest]:.4g} (rank {highest})", "#7b3294")]
    if cap is not None:
        axes.axhline(cap, color=_INK, linestyle=(0, (5, 3)), linewidth=0.9, zorder=2)
        notes.append((cap, f"cap {cap:.4g}", _INK))
    for order, (level, text, colour) in enumerate(notes):
        axes.annotate(
            text,
            (1.0, level),
            xycoords=axes.get_yaxis_transform(),
            xytext=(5, (2, 10)[order] if len(notes) > 1 else 0),
            textcoords="offset points",
            va=("top", "top")[order],
            fontsize=8,
            color=colour,
        )
    axes.set_ylim(0, 1.08 * max(peaks[highest], cap or 0.0) or 1.0)
    axes.set_ylabel("memory per rank", fontsize=8)
    axes.set_xlabel("time", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def memory_curve(
    schedule: Schedule, timeline: Timeline, rank: int
) -> tuple[list[float], list[float]]:
    """Times at which a rank's memory changes, and its level from then on."""
    changes: dict[float, float] = {0.0: 0.0, timeline.end_s: 0.0}
    for home, task, span in _placed(schedule, timeline):
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


def _placed(schedule: Schedule, timeline: Timeline) -> Iterator[tuple[int, Task, Span]]:
    for (rank, _, task), span in zip(schedule.tasks(), timeline.spans, strict=True):
        yield rank, task, span


def _palette(schedule: Schedule, name: str) -> tuple[str, str, str]:
    names = [pipe.name for pipe in schedule.problem.pipelines]
    return _COLOURS[names.index(name) % len(_COLOURS)]


def _colour(schedule: Schedule, task: Task) -> str:
    return _palette(schedule, task.pipeline)[_SHADE[task.op]]


def _box(start: float, end: float, rank: int, half: float) -> list[tuple[float, float]]:
    return [(start, rank - half), (end, rank - half), (end, rank + half), (start, rank + half)]
