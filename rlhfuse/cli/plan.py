"""``rlhfuse plan``: what a step would take on a cluster, and what fusion would buy there."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rlhfuse.cli.common import emit_json, stdout_kept_clean, user_errors

if TYPE_CHECKING:
    from rlhfuse.config import Config
    from rlhfuse.planner.summary import Plan, PlanSummary, WhatIfRow


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--hardware", help="Short for plan.hardware=...: a100, h100, h200, b200, cpu.")
@click.option("--nodes", type=int, help="Short for plan.num_nodes=...")
@click.option("--html", type=click.Path(dir_okay=False), help="Write a self-contained page.")
@click.option("--perfetto", type=click.Path(dir_okay=False), help="Write the fused timeline.")
@click.option(
    "--costs",
    type=click.Path(dir_okay=False),
    help="Training costs of one mini-batch, as `rlhfuse profile --costs` writes them.",
)
@click.option("--no-what-if", is_flag=True, help="Skip other cluster sizes, limits, batches.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def plan(
    config: str,
    overrides: Sequence[str],
    hardware: str | None,
    nodes: int | None,
    html: str | None,
    perfetto: str | None,
    costs: str | None,
    no_what_if: bool,
    as_json: bool,
) -> None:
    """Predict a step of CONFIG on the cluster that its plan section names. Needs no GPU.

    Models may be Hugging Face folders or shapes by name (llama-13b, qwen2.5-7b, ...).
    """
    # Imported late: `rlhfuse --help` must not wait for numba.
    from rlhfuse.config_file import load
    from rlhfuse.planner.plan import make_plan
    from rlhfuse.schedules.problem_file import read_problem
    from rlhfuse.timeline import save_chrome

    short = [f"plan.hardware={hardware}"] if hardware else []
    short += [f"plan.num_nodes={nodes}"] if nodes is not None else []
    with user_errors(), stdout_kept_clean(as_json):
        loaded = load(config, [*overrides, *short])
        measured = read_problem(costs) if costs is not None else None
        made = make_plan(loaded, _recorded(loaded), compare=not no_what_if, measured=measured)
        if html is not None:
            _write_page(Path(html), made, Path(config).name)
        if perfetto is not None:
            save_chrome(made.fused, Path(perfetto))
    if as_json:
        emit_json(made.summary)
        return
    _print(made)
    for path in (html, perfetto):
        if path is not None:
            click.echo(path)


def _recorded(config: "Config") -> list[int]:
    from rlhfuse.planner.lengths_file import read_lengths

    return read_lengths(Path(config.plan.lengths_file)) if config.plan.lengths_file else []


def _write_page(path: Path, made: "Plan", title: str) -> None:
    from rlhfuse.report.plan_page import render_plan

    path.write_text(render_plan(made, title), encoding="utf-8")


def _print(made: "Plan") -> None:
    from rlhfuse.planner.step import LEGEND, drawn

    summary = made.summary
    step = summary.step_s
    click.echo(
        f"Predicted, not measured: {summary.num_devices} x {summary.hardware}. One step takes "
        f"{step.fused:.3g} s fused, {step.serial:.3g} s serial: {summary.speedup:.2f} times as fast"
    )
    click.echo(f"\n  {'':<12}{'serial s':>10}{'fused s':>10}{'ratio':>8}")
    for name, pair in summary.stages.items():
        ratio = f"{pair.serial_s / pair.fused_s:.2f}" if pair.fused_s > 0 else "-"
        click.echo(f"  {name:<12}{pair.serial_s:>10.3g}{pair.fused_s:>10.3g}{ratio:>8}")
    wall_s = max(made.serial.end_s, made.fused.end_s)
    for name, timeline in (("serial", made.serial), ("fused", made.fused)):
        click.echo(f"\n{name}, {wall_s:.3g} s across; some devices")
        click.echo("\n".join(drawn(timeline, wall_s)))
    click.echo(LEGEND)
    _print_text(summary)
    _print_table(summary.what_if)


def _print_text(summary: "PlanSummary") -> None:
    idle = "  ".join(f"{name} {part:.1%}" for name, part in [*summary.bubble.items()][:6])
    click.echo(f"\nnot computing in the fused step, of device time: {idle}")
    memory = summary.memory_per_device
    gb = {name: getattr(memory, name) / 1e9 for name in
          ("weights", "optimizer", "activations", "kv", "total", "capacity")}  # fmt: skip
    parts = ", ".join(f"{name} {value:.3g}" for name, value in list(gb.items())[:4])
    verdict = "fits" if summary.fits else "DOES NOT FIT"
    click.echo(
        f"memory, GB a device: {parts}; {gb['total']:.3g} of {gb['capacity']:.3g}: {verdict}"
    )
    for title, lines in (
        ("fused step", summary.limits),
        ("would help", summary.next_steps),
        ("assumed", summary.assumed),
    ):
        if lines:
            click.echo(f"\n{title}")
            click.echo("\n".join(f"  {line}" for line in lines))
    click.echo("\nrecommended")
    click.echo("  " + " ".join(f"{key}={_value(value)}" for key, value in
                                summary.recommended.items()))  # fmt: skip
    for worth, name in (
        (summary.worthwhile.inter_stage, "inter-stage"),
        (summary.worthwhile.intra_stage, "intra-stage"),
    ):
        if worth.worthwhile:
            click.echo(f"  {name} fusion saves {worth.saving_fraction:.1%}: {worth.reason}")
    for text in summary.warnings:
        click.echo(f"warning: {text}", err=True)


def _value(value: int | float | str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _print_table(rows: "Sequence[WhatIfRow]") -> None:
    if not rows:
        return
    click.echo(f"\n  {'what if':<24}{'serial s':>10}{'fused s':>10}{'ratio':>8}{'samples/s':>11}")
    for row in rows:
        click.echo(
            f"  {row.name:<24}{row.serial_s:>10.3g}{row.fused_s:>10.3g}{row.speedup:>8.2f}"
            f"{row.samples_per_s:>11.4g}"
        )
