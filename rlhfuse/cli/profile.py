"""``rlhfuse profile``: where the time of a step went, and what would give it back."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlhfuse.cli.common import CONDITION, OK, emit_json, stdout_kept_clean, user_errors

if TYPE_CHECKING:
    from rlhfuse.profiler.readers.chrome_events import FieldNames
    from rlhfuse.profiler.summary import ProfileSummary
    from rlhfuse.profiler.table import SpanTable
    from rlhfuse.profiler.trace import Trace

_BAR = 30
_TREND_STEPS = 100


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--step", type=int, help="The step to explain; by default the last one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option("--map", "map_file", type=click.Path(), help="YAML: names in Chrome event lists.")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a self-contained page.")
@click.option("--csv", type=click.Path(dir_okay=False), help="Write the causes per rank as CSV.")
@click.option("--perfetto", type=click.Path(dir_okay=False), help="Write Chrome trace JSON.")
@click.option("--fail-if", multiple=True, help="Exit with 3 if this holds: 'bubble_fraction>0.2'.")
@click.option("--critic-scale", default=1.0, show_default=True, help="Cost of an assumed critic.")
@click.option("--no-what-if", is_flag=True, help="Skip the replays under other conditions.")
def profile(
    paths: tuple[str, ...],
    step: int | None,
    as_json: bool,
    map_file: str | None,
    html: str | None,
    csv: str | None,
    perfetto: str | None,
    fail_if: tuple[str, ...],
    critic_scale: float,
    no_what_if: bool,
) -> int:
    """Explain the idle time of one step of PATH...

    PATH is a run folder of ours, a timeline file, or a trace by others: PyTorch profiler JSON per
    rank, Primus pp_rank JSON, Chrome events with step, micro-batch and stage, or the step metrics
    that verl and others log.
    """
    from rlhfuse.profiler.condition import holds
    from rlhfuse.profiler.explain import explain
    from rlhfuse.profiler.readers.detect import open_trace

    with user_errors(), stdout_kept_clean(as_json):
        names = _field_names(Path(map_file)) if map_file is not None else None
        trace = open_trace([Path(path) for path in paths], names)
        scale = None if no_what_if else critic_scale
        timeline, summary = explain(trace, trace.pick(step), critic_scale=scale)
        failed = [expression for expression in fail_if if holds(expression, summary)]
        if html is not None:
            _write_page(Path(html), trace, timeline, summary, title=_title(paths))
        if csv is not None:
            Path(csv).write_text(_csv(summary))
        if perfetto is not None:
            _write_perfetto(Path(perfetto), timeline)
    if as_json:
        emit_json(summary)
    else:
        _print(summary)
        for path in (html, csv, perfetto):
            if path is not None:
                click.echo(path)
    for expression in failed:
        click.echo(f"condition holds: {expression}", err=True)
    return CONDITION if failed else OK


def _field_names(path: Path) -> "FieldNames":
    import msgspec
    import yaml

    from rlhfuse.profiler.readers.chrome_events import FieldNames

    try:
        return msgspec.convert(yaml.safe_load(path.read_text()), FieldNames)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ValueError(f"--map {path}: {error}") from error


def _write_page(
    path: Path, trace: "Trace", timeline: "SpanTable", summary: "ProfileSummary", title: str
) -> None:
    from rlhfuse.profiler.attribution import attribute
    from rlhfuse.report.profile_page import render_profile

    trend = [(n, attribute(trace.load(n).timeline)) for n in trace.steps[-_TREND_STEPS:]]
    text = render_profile(summary, timeline, title, trend)
    path.write_text(text, encoding="utf-8")


def _write_perfetto(path: Path, timeline: "SpanTable") -> None:
    """The timeline with its idle time filled in, each piece named by its cause."""
    from rlhfuse.profiler.attribution import segments_by_lane
    from rlhfuse.timeline import Kind, Span, Timeline, save_chrome

    waits = [
        Span(lane, piece.start_s, piece.end_s, Kind.WAIT, f"idle: {piece.cause.value}")
        for lane, pieces in segments_by_lane(timeline).items()
        for piece in pieces
        if piece.span is None
    ]
    busy = timeline.spans(~timeline.is_kind([Kind.WAIT]))
    save_chrome(Timeline((*busy, *waits)), path)


def _title(paths: Sequence[str]) -> str:
    return ", ".join(Path(path).resolve().name for path in paths[:3])


def _csv(summary: "ProfileSummary") -> str:
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


def _print(summary: "ProfileSummary") -> None:
    bubble = summary.bubble_fraction
    step = "" if summary.step is None else f", step {summary.step} ({len(summary.steps)} in all)"
    click.echo(f"{summary.format}, {summary.num_ranks} ranks{step}: {summary.wall_s:.4g} s")
    if bubble is not None:
        worst = max(summary.per_rank, key=lambda rank: rank.idle_s)
        click.echo(
            f"not computing: {bubble:.1%} of device time (most on rank {_plain(worst.rank)}: "
            f"{worst.bubble_fraction:.1%})"
        )
    total = sum(summary.causes.values()) or 1.0
    click.echo("")
    for name, seconds in sorted(summary.causes.items(), key=lambda item: -item[1]):
        bar = "#" * round(_BAR * seconds / total)
        click.echo(f"  {name:<24}{seconds:>11.4g} s {seconds / total:>7.1%}  {bar}")
    if summary.schedule is not None:
        ran = summary.schedule
        click.echo(
            f"\nschedule: {ran.name}; ideally {ran.ideal_makespan_s:.4g} s of training, "
            f"took {ran.makespan_s:.4g} s"
        )
        for text in ran.stragglers:
            click.echo(f"  slow: {_plain(text)}")
    if summary.what_if:
        click.echo("\nwhat if")
        for what in summary.what_if:
            click.echo(f"  {what.name:<58}{what.makespan_s:>9.4g} s {what.saving_fraction:>+8.1%}")
    for text in summary.warnings:
        click.echo(f"note: {_plain(text)}", err=True)


def _plain(text: str) -> str:
    """Names from a trace, without what a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text)
