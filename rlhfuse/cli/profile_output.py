"""What ``rlhfuse profile`` prints and writes: the screen, CSV, a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rlhfuse.profiler.summary import ProfileSummary
    from rlhfuse.profiler.table import SpanTable

_BAR = 30
_MOST_CAUSES = 16
_DPI = 130
_FINEST = 4000  # pieces of a lane narrower than a 4000th of the picture are not drawn apart


def print_summary(summary: "ProfileSummary") -> None:
    """One screen: the bubble, its causes, the schedule, what would help, notes on stderr."""
    bubble = summary.bubble_fraction
    step = "" if summary.step is None else f", step {summary.step} ({len(summary.steps)} in all)"
    ranks = f"{summary.num_ranks} ranks" if summary.num_ranks != 1 else "1 lane"
    click.echo(f"{summary.format}, {ranks}{step}: {summary.wall_s:.4g} s")
    if bubble is not None:
        worst = max(summary.per_rank, key=lambda rank: rank.idle_s)
        click.echo(
            f"not computing: {bubble:.1%} of device time (most on rank {plain(worst.rank)}: "
            f"{worst.bubble_fraction:.1%})"
        )
    click.echo("")
    _print_causes(summary)
    if summary.schedule is not None:
        ran = summary.schedule
        click.echo(
            f"\nschedule: {ran.name}; ideally {ran.ideal_makespan_s:.4g} s of training, "
            f"took {ran.makespan_s:.4g} s"
        )
        for text in ran.stragglers[:5]:
            click.echo(f"  slow: {plain(text)}")
    _print_what_ifs(summary)
    for text in summary.warnings:
        click.echo(f"note: {plain(text)}", err=True)


def _print_causes(summary: "ProfileSummary") -> None:
    total = sum(summary.causes.values()) or 1.0
    ordered = sorted(summary.causes.items(), key=lambda item: -item[1])
    for name, seconds in ordered[:_MOST_CAUSES]:
        bar = "#" * round(_BAR * seconds / total)
        click.echo(f"  {name:<24}{seconds:>11.4g} s {seconds / total:>7.1%}  {bar}")
    rest = sum(seconds for _, seconds in ordered[_MOST_CAUSES:])
    if rest:
        click.echo(f"  {'others':<24}{rest:>11.4g} s {rest / total:>7.1%}")


def _print_what_ifs(summary: "ProfileSummary") -> None:
    if not summary.what_if:
        return
    width = max(len(what.name) for what in summary.what_if)
    known = any(what.bubble_recovered is not None for what in summary.what_if)
    title = f"{'what if':<{width + 2}}{'step':>11}{'saved':>9}{'of bubble' * known:>11}"
    click.echo(f"\n{title.rstrip()}")
    for what in summary.what_if:
        share = f"{what.bubble_recovered:.0%}" if what.bubble_recovered is not None else ""
        figures = f"{what.makespan_s:>9.4g} s{what.saving_fraction:>+9.1%}{share:>11}"
        click.echo(f"  {what.name:<{width}}{figures}".rstrip())
    if summary.what_if_note:
        click.echo(f"  ({summary.what_if_note})")


def plain(text: str) -> str:
    """Names from a trace, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)


def csv_of(summary: "ProfileSummary") -> str:
    """One row per rank; columns are the causes, in seconds."""
    names = list(summary.causes)
    lines = [",".join(["rank", "wall_s", "compute_s", "idle_s", *names])]
    for rank in summary.per_rank:
        # A lane's name may hold anything: quoted, with quotes doubled.
        quoted = '"' + rank.rank.replace('"', '""') + '"'
        values = [rank.wall_s, rank.compute_s, rank.idle_s]
        values += [rank.causes.get(name, 0.0) for name in names]
        lines.append(",".join([quoted, *(repr(value) for value in values)]))
    return "\n".join(lines) + "\n"


def save_plot(table: "SpanTable", path: Path, headline: str) -> None:
    """Ranks as rows, work and causes of idle time in the report's colours: PNG or SVG."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from rlhfuse.profiler.attribution import lane_segments
    from rlhfuse.profiler.causes import CAUSES
    from rlhfuse.report.palette import style_of

    grid, rows = lane_segments(table)
    figure = Figure(figsize=(14, 2.2 + 0.34 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    labels: dict[str, tuple[str, float, bool]] = {}
    for place, segments in enumerate(rows.values()):
        cause, edges, span = segments.cause, segments.edges_s, segments.span
        # Touching pieces of one look are drawn as one; what no pixel could show is left out.
        fine = np.diff(edges) < grid.wall_s / _FINEST
        change = np.flatnonzero(np.diff(cause, prepend=-1).astype(bool) | ~fine)
        starts, ends = edges[change], np.append(edges[change[1:]], edges[-1])
        wide = ends - starts >= grid.wall_s / _FINEST
        for code in np.unique(cause[change][wide]).tolist():
            mine = wide & (cause[change] == code)
            for first in np.flatnonzero(mine)[:1]:
                row = int(span[change[first]])
                name = table.names[table.name[row]] if row >= 0 else None
                style = style_of(CAUSES[code], name)
            seconds = float((ends - starts)[mine].sum())
            before = labels.get(style.label, ("", 0.0, False))[1]
            labels[style.label] = (style.color, before + seconds, style.idle)
            axes.broken_barh(
                list(zip(starts[mine].tolist(), (ends - starts)[mine].tolist(), strict=True)),
                (place - 0.4, 0.8),
                facecolor=style.color,
                alpha=0.35 if style.idle else 1.0,
                linewidth=0,
            )
    axes.set_yticks(range(len(rows)), [plain(lane)[:24] for lane in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, grid.wall_s or 1.0)
    axes.set_xlabel("seconds")
    axes.set_title(plain(headline)[:120].replace("$", r"\$"), loc="left", fontsize=11)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    _legend(axes, labels)
    figure.savefig(path, dpi=_DPI)


def _legend(axes: object, labels: dict[str, tuple[str, float, bool]]) -> None:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

    assert isinstance(axes, Axes)
    ordered = sorted(labels.items(), key=lambda item: (item[1][2], -item[1][1]))
    handles = [
        Patch(facecolor=color, alpha=0.35 if idle else 1.0, label=label)
        for label, (color, _, idle) in ordered
    ]
    axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9
    )
