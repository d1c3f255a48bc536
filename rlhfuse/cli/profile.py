"""``rlhfuse profile``: where the time of a step went, and what would give it back."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlhfuse.cli.common import CONDITION, OK, emit_json, stdout_kept_clean, user_errors

if TYPE_CHECKING:
    from rlhfuse.profiler.explain import Explained
    from rlhfuse.profiler.readers.chrome_events import FieldNames
    from rlhfuse.profiler.summary import ProfileSummary
    from rlhfuse.profiler.trace import Trace
    from rlhfuse.schedules.ir import Pipeline

_TREND_STEPS = 100
_EVERY_S = 1.0
_FILE = click.Path(dir_okay=False)


@click.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path())
@click.option("--step", type=int, help="The step to explain; by default the last one.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.option(
    "--map",
    "map_name",
    help="Names in Chrome event lists: a YAML file, or ndtimeline, stragglers, megatron.",
)
@click.option("--html", type=_FILE, help="Write a self-contained page.")
@click.option("--csv", type=_FILE, help="Write the causes per rank as CSV.")
@click.option("--perfetto", type=_FILE, help="Write Chrome trace JSON, with messages as arrows.")
@click.option("--plot", type=_FILE, help="Write a picture: .png or .svg.")
@click.option("--costs", type=_FILE, help="Write measured costs as a problem for schedule, plan.")
@click.option("--fail-if", multiple=True, help="Exit with 3 if this holds: 'bubble_fraction>0.2'.")
@click.option("--critic-scale", default=1.0, show_default=True, help="Cost of an assumed critic.")
@click.option("--critic", type=_FILE, help="Costs of the critic: a problem of one pipeline.")
@click.option("--no-what-if", is_flag=True, help="Skip the replays under other conditions.")
@click.option("--attach", is_flag=True, help="Follow a run in progress: a line as each step ends.")
@click.option("--stop-after-s", type=float, help="With --attach: end when no step came so long.")
def profile(
    paths: tuple[str, ...],
    step: int | None,
    as_json: bool,
    map_name: str | None,
    html: str | None,
    csv: str | None,
    perfetto: str | None,
    plot: str | None,
    costs: str | None,
    fail_if: tuple[str, ...],
    critic_scale: float,
    critic: str | None,
    no_what_if: bool,
    attach: bool,
    stop_after_s: float | None,
) -> int:
    """Explain the idle time of one step of PATH...

    PATH is a run folder of ours, a timeline file, or a trace by others: PyTorch profiler JSON per
    rank, nsys SQLite exports, Primus pp_rank JSON, Chrome events with step, micro-batch and stage,
    FlexFusion text, torch schedule CSV, rollout dumps, or the step metrics that verl and others log
    (JSONL, console, TensorBoard). Metrics and rollout dumps of one run are best given together.
    """
    with user_errors():
        if attach:
            return _attach(paths, as_json, fail_if, stop_after_s)
        with stdout_kept_clean(as_json):
            names = _field_names(map_name) if map_name is not None else None
            trace = _open(paths, names, quiet=as_json)
            found = _explain(trace, trace.pick(step), critic_scale, critic, no_what_if)
            if not no_what_if:
                found = _simulated(paths, found)
            failed = _failed(fail_if, found.summary)
            outputs = _Outputs(html, csv, perfetto, plot, costs)
            outputs.write(trace, found, _title(paths))
    if as_json:
        emit_json(found.summary)
    else:
        from rlhfuse.cli.profile_output import print_summary

        print_summary(found.summary)
        for path in outputs.paths:
            click.echo(path)
    for expression in failed:
        click.echo(f"condition holds: {expression}", err=True)
    return CONDITION if failed else OK


@dataclass(frozen=True, slots=True)
class _Outputs:
    """Files that were asked for."""

    html: str | None
    csv: str | None
    perfetto: str | None
    plot: str | None
    costs: str | None

    @property
    def paths(self) -> list[str]:
        every = (self.html, self.csv, self.perfetto, self.plot, self.costs)
        return [path for path in every if path is not None]

    def write(self, trace: "Trace", found: "Explained", title: str) -> None:
        from rlhfuse.cli.profile_output import csv_of, save_plot
        from rlhfuse.profiler.perfetto import save_perfetto

        if self.html is not None:
            _write_page(Path(self.html), trace, found, title)
        if self.csv is not None:
            Path(self.csv).write_text(csv_of(found.summary))
        if self.perfetto is not None:
            save_perfetto(found.table, Path(self.perfetto))
        if self.plot is not None:
            if Path(self.plot).suffix not in (".png", ".svg"):
                raise ValueError(f"--plot {self.plot}: expected a name ending in .png or .svg")
            save_plot(found.table, Path(self.plot), title)
        if self.costs is not None:
            _write_costs(Path(self.costs), found)


def _open(paths: Sequence[str], names: "FieldNames | None", *, quiet: bool) -> "Trace":
    """The trace, with progress on a terminal's stderr where reading takes long."""
    from rlhfuse.profiler.readers.detect import open_trace

    shown = time.monotonic()
    drawn = False

    def tell(share: float) -> None:
        nonlocal shown, drawn
        if time.monotonic() - shown >= _EVERY_S:
            shown, drawn = time.monotonic(), True
            click.echo(f"\rreading: {share:.0%}", nl=False, err=True)

    trace = open_trace(
        [Path(path) for path in paths], names, None if quiet or not sys.stderr.isatty() else tell
    )
    if drawn:
        click.echo("\r              \r", nl=False, err=True)
    return trace


def _explain(
    trace: "Trace", step: int | None, scale: float, critic: str | None, no_what_if: bool
) -> "Explained":
    from rlhfuse.profiler.explain import explain_step

    given = _critic(Path(critic)) if critic is not None else None
    return explain_step(trace, step, critic_scale=None if no_what_if else scale, critic=given)


def _simulated(paths: Sequence[str], found: "Explained") -> "Explained":
    """With the simulation of one of our own steps under the other fusions, where its run folder
    holds what that takes; else with the reason, or, of others' traces, as it is."""
    folder, summary = Path(paths[0]), found.summary
    if len(paths) > 1 or not (folder / "config.yaml").is_file() or summary.step is None:
        return found
    import dataclasses

    import msgspec

    from rlhfuse.profiler.summary import of_bubble
    from rlhfuse.run_what_if import simulated_what_if

    if sys.stderr.isatty():
        click.echo("simulating the step with other fusions (--no-what-if: not) ...", err=True)
    what, told = [], ""
    try:
        simulated, told = simulated_what_if(folder, summary.step)
        what = [of_bubble(simulated, summary.bubble_fraction)]
    except (ValueError, KeyError) as error:
        told = f"no simulation of this step with other fusions: {error}"
    return dataclasses.replace(
        found,
        summary=msgspec.structs.replace(
            summary, what_if=[*summary.what_if, *what], warnings=[*summary.warnings, told]
        ),
    )


def _critic(path: Path) -> "Pipeline":
    from rlhfuse.schedules.problem_file import read_problem

    pipes = read_problem(path).pipelines
    if len(pipes) != 1:
        raise ValueError(f"--critic {path}: {len(pipes)} pipelines in it; expected one, the critic")
    return pipes[0]


def _failed(expressions: Sequence[str], summary: "ProfileSummary") -> list[str]:
    from rlhfuse.profiler.condition import holds

    return [expression for expression in expressions if holds(expression, summary)]


def _attach(
    paths: Sequence[str], as_json: bool, fail_if: Sequence[str], stop_after_s: float | None
) -> int:
    from rlhfuse.cli.profile_follow import follow

    if len(paths) != 1:
        raise ValueError(f"--attach follows one run folder, not {len(paths)} paths")
    failed: list[str] = []
    try:
        follow(
            Path(paths[0]),
            as_json=as_json,
            stop_after_s=stop_after_s,
            on_step=lambda summary: failed.extend(_failed(fail_if, summary)),
        )
    except KeyboardInterrupt:
        click.echo("", err=True)
    for expression in dict.fromkeys(failed):
        click.echo(f"condition held: {expression}", err=True)
    return CONDITION if failed else OK


def _field_names(name: str) -> "FieldNames":
    import msgspec
    import yaml

    from rlhfuse.profiler.readers.chrome_events import PRESETS, FieldNames

    if name in PRESETS:
        return PRESETS[name]
    if not Path(name).is_file():
        raise ValueError(f"--map {name}: neither a file nor one of {', '.join(PRESETS)}")
    try:
        return msgspec.convert(yaml.safe_load(Path(name).read_text()), FieldNames)
    except (yaml.YAMLError, msgspec.ValidationError) as error:
        raise ValueError(f"--map {name}: {error}") from error


def _write_page(path: Path, trace: "Trace", found: "Explained", title: str) -> None:
    from rlhfuse.profiler.attribution import attribute
    from rlhfuse.report.profile_page import render_profile

    trend = [(n, attribute(trace.load(n).timeline)) for n in trace.steps[-_TREND_STEPS:]]
    text = render_profile(found.summary, found.table, title, trend)
    path.write_text(text, encoding="utf-8")


def _write_costs(path: Path, found: "Explained") -> None:
    import yaml

    from rlhfuse.profiler.costs import measured_problem
    from rlhfuse.schedules.problem_file import problem_to_tree

    tree = problem_to_tree(measured_problem(found.rounds))
    note = "# Measured by rlhfuse profile; seconds. Activations count 1 a micro-batch.\n"
    path.write_text(note + yaml.safe_dump(tree, sort_keys=False))


def _title(paths: Sequence[str]) -> str:
    return ", ".join(Path(path).resolve().name for path in paths[:3])
