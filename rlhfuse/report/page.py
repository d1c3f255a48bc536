"""`write_report`: a run folder becomes one self-contained HTML page."""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import median

from rlhfuse.profiler.causes import IDLE, MOVEMENT, Cause
from rlhfuse.report import charts, markup, numbers
from rlhfuse.report.lanes import LaneData, lane_data
from rlhfuse.report.memory import memory_section
from rlhfuse.report.palette import CAUSES
from rlhfuse.report.samples import samples_section
from rlhfuse.report.sources import RunFolder, StepValues, read_run, read_timeline

_TRAIN, _HELD_OUT = "#0072b2", ("#d55e00", "#009e73", "#a8457f", "#b8860b")
_SERIAL, _FUSED = "#9aa5ad", "#0072b2"


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` into a run folder and return its path. It replaces an older one.

    Raises:
        ValueError: `run_folder` is not a folder.
    """
    run = read_run(run_folder)
    path = run_folder / "report.html"
    aside = path.with_name("report.html.part")
    aside.write_text(render(run), encoding="utf-8")
    aside.replace(path)
    return path


def render(run: RunFolder) -> str:
    """The page as text."""
    views, missing = _timelines(run)
    body = [
        _tiles(run),
        _timeline_section(views),
        _idle_section(run, views),
        _fusion_section(run),
        memory_section(run),
        _learning_section(run),
        _length_section(run),
        samples_section(run.samples),
        _config_section(run),
        _environment_section(run),
        _notices_section([*run.notices, *missing]),
    ]
    count = sum(row.trained for row in run.steps)
    done = f"{count} steps" if count != 1 else "1 step"
    return markup.page(
        title=run.title,
        kicker="rlhfuse run report",
        lead=f"{done} of PPO. Same samples, same update, less idle time." if count else "",
        body="\n".join(part for part in body if part),
        data=views,
    )


def _timelines(run: RunFolder) -> tuple[dict[str, LaneData], list[str]]:
    """The last fused step, and the last serial one where there is one, to be drawn."""
    serial = {row.step for row in run.steps if row.serial}
    chosen = {
        "fused": [n for n in run.timeline_files if n not in serial][-1:],
        "serial": [n for n in run.timeline_files if n in serial][-1:],
    }
    views: dict[str, LaneData] = {}
    missing = []
    for name, steps in chosen.items():
        for step in steps:
            read = read_timeline(run.timeline_files[step])
            if isinstance(read, str):
                missing.append(read)
                continue
            what = f"Step {step}, serial (for comparison)" if name == "serial" else f"Step {step}"
            views[f"timeline-{name}"] = lane_data(read, what)
    return views, missing


def _tiles(run: RunFolder) -> str:
    change = numbers.reward_change(run)
    speedup = numbers.measured_speedup(run)
    fused = [row for row in run.steps if not row.serial]
    idle = [row.values["perf/idle_fraction"] for row in fused if "perf/idle_fraction" in row.values]
    times = [row.values["timing_s/step"] for row in fused if "timing_s/step" in row.values]
    kl = run.series("critic/kl") or run.series("actor/ppo_kl")
    tiles = [
        markup.tile(
            "Reward, before \u2192 after",
            f"{_short(change.before)} \u2192 {_short(change.after)}" if change else None,
            change.what if change else "needs two steps or validations",
        ),
        markup.tile(
            "Fused against serial",
            f"{speedup[0]:.2f}\u00d7 faster" if speedup else None,
            speedup[1] if speedup else "set fusion.audit_every to measure it",
        ),
        markup.tile(
            "Devices idle",
            f"{median(idle):.0%}" if idle else None,
            "of device time: nothing computed, nothing moved; median over steps",
        ),
        markup.tile(
            "Time per step",
            f"{median(times):.3g} s" if times else None,
            f"median; {sum(times):.0f} s in all" if times else "no timing_s/step",
        ),
        markup.tile(
            "KL to the reference, last step" if run.series("critic/kl") else "Policy KL, last step",
            f"{kl[-1][1]:.3g}" if kl else None,
            f"largest {max(y for _, y in kl):.3g}" if kl else "no critic/kl",
        ),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _short(value: float) -> str:
    """A number that fits a tile, with a true minus sign."""
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return text.replace("-", "\u2212")


def _timeline_section(views: dict[str, LaneData]) -> str:
    wall = max((data.wall_s for data in views.values()), default=0.0)
    return markup.section(
        "One step, device by device",
        "Full blocks are work; pale blocks with a line below are idle time, coloured by its cause. "
        "Click a name below the picture to hold it up."
        + (" Both pictures have one scale." if len(views) > 1 else ""),
        *(markup.timeline_view(name, data, wall) for name, data in views.items()),
    )


def _idle_section(run: RunFolder, views: dict[str, LaneData]) -> str:
    rows = [row for row in run.steps if numbers.has_causes(row)]
    shares = numbers.cause_shares(rows)
    idle = [c for c in (*IDLE, *MOVEMENT) if c in shares]
    idle.sort(key=lambda cause: -sum(shares[cause]))
    stacks = [charts.Stack(CAUSES[c].label, CAUSES[c].color, shares[c]) for c in idle]
    names = [f"step {row.step}" + (" (serial)" if row.serial else "") for row in rows]
    chart = charts.stacked_bars(names, stacks, "step", "% of device time", " %")
    return markup.section(
        "Where time went that was not computing",
        "Every second of every device has one cause; the shares below and the computing add up to "
        "100 %. Long tail: others still generate and nothing is left to score. Stage wait: a "
        "barrier, also one that holds back scoring that was ready.",
        chart,
        _cause_table(rows, idle) if rows else "",
    )


def _cause_table(rows: Sequence[StepValues], causes: Sequence[Cause]) -> str:
    fused = [row for row in rows if not row.serial]
    serial = [row for row in rows if row.serial]
    groups = [("fused", fused), ("serial", serial)] if fused and serial else [("", rows)]
    head = ["cause"]
    for name, _ in groups:
        head += [f"{name} device-s per step".strip(), f"{name} share".strip()]
    body = []
    for cause in causes:
        cells = [CAUSES[cause].label]
        for _, members in groups:
            mean = sum(m.values.get(f"bubble/{cause.value}", 0.0) for m in members) / len(members)
            share = sum(numbers.cause_shares(members).get(cause, [0.0])) / len(members)
            cells += [f"{mean:.3g}", f"{share:.1f} %"]
        body.append(cells)
    total = ["all of these"]
    for i in range(1, len(head)):
        numbers_of = [float(row[i].removesuffix(" %")) for row in body]
        total.append(f"{sum(numbers_of):.3g}" if i % 2 else f"{sum(numbers_of):.1f} %")
    return markup.table(head, [*body, total], numeric_from=1, sum_row=True)


def _fusion_section(run: RunFolder) -> str:
    parts = []
    stages = numbers.stage_times(run)
    if stages:
        rows = []
        for stage in stages:
            note = f"{stage.serial_s:.3g} s"
            rows.append(charts.Bar(f"{stage.label}: serial", stage.serial_s, _SERIAL, note))
            note = f"{stage.fused_s:.3g} s  ({stage.speedup:.2f}\u00d7)"
            rows.append(charts.Bar("fused", stage.fused_s, _FUSED, note))
        parts.append(charts.bars(rows, label_width=210))
    gains = [value for _, value in run.series("fusion/rebuilding_gain")]
    if gains:
        parts.append(
            "<p>Schedules are rebuilt as costs are measured: predicted to be "
            f"{median(gains):.3f} times as fast as those for the first guess of costs (median of "
            f"{len(gains)} comparisons, one mini-batch each).</p>"
        )
    check = run.verification
    if check is not None:
        verdicts = (check.tokens_equal, check.rewards_equal, check.weights_equal)
        rows_of = [
            [what, "identical" if equal else "DIFFERENT"]
            for what, equal in zip(("tokens", "rewards", "weights"), verdicts, strict=True)
        ]
        rows_of.append(
            ["seconds, serial and fused", f"{check.serial_s:.3g} and {check.fused_s:.3g}"]
        )
        if check.first_difference:
            rows_of.append(["first difference", check.first_difference])
        head = [f"rlhfuse verify, {check.steps} steps", ""]
        parts.append(markup.table(head, rows_of, numeric_from=2))
    return markup.section(
        "Fused against serial",
        "Medians over the run's serial and fused steps, each scaled to the same number of tokens. "
        "With fusion the stages overlap, so their times need not add up to the step.",
        *parts,
    )


def _learning_section(run: RunFolder) -> str:
    reward = run.series("critic/rewards/mean")
    score = run.series("critic/score/mean")
    lines = [charts.Line("training reward (with KL penalty)", _TRAIN, reward)] if reward else []
    if score:
        lines.append(charts.Line("training score", "#56b4e9", score))
    for color, (name, points) in zip(
        _HELD_OUT, numbers.validation_series(run).items(), strict=False
    ):
        lines.append(charts.Line(f"held out: {name}", color, points, dots=True))
    kl = [
        charts.Line(label, color, run.series(name))
        for name, label, color in (
            ("critic/kl", "KL to the reference", _TRAIN),
            ("actor/ppo_kl", "KL of the update", "#a8457f"),
        )
        if run.series(name)
    ]
    charts_ = [
        charts.line_chart(lines, [], "step", "reward"),
        charts.line_chart(kl, [], "step", "KL, nats"),
    ]
    shown = "".join(f"<div>{chart}</div>" for chart in charts_ if chart)
    return markup.section("Learning", "", f'<div class="two">{shown}</div>' if shown else "")


def _length_section(run: RunFolder) -> str:
    mean, low, high = (run.series(f"response_length/{name}") for name in ("mean", "min", "max"))
    bands = [charts.Band("shortest to longest", _TRAIN, low, high)] if low and high else []
    lines = [charts.Line("mean", _TRAIN, mean)] if mean else []
    for name, label, color in (
        ("p99", "99th percentile", "#d55e00"),
        ("median", "median", "#009e73"),
    ):
        if points := run.series(f"response_length/{name}"):
            lines.append(charts.Line(label, color, points))
    chosen = run.lengths[:1] + run.lengths[-1:] if len(run.lengths) > 1 else run.lengths
    colors = (_SERIAL, _TRAIN)[-len(chosen) :] if chosen else ()
    groups = [
        (f"step {row.step}", color, row.lengths)
        for row, color in zip(chosen, colors, strict=True)
        if row.lengths
    ]
    found = [
        charts.line_chart(lines, bands, "step", "response length, tokens"),
        charts.histogram(groups, "response length, tokens"),
    ]
    shown = "".join(f"<div>{chart}</div>" for chart in found if chart)
    why = "The few long responses are the tail that keeps devices waiting in serial runs."
    return markup.section(
        "Response lengths", why, f'<div class="two">{shown}</div>' if shown else ""
    )


def _config_section(run: RunFolder) -> str:
    if not run.config:
        return ""
    return (
        "<section><details><summary>Resolved configuration</summary>"
        f"<pre>{escape(run.config)}</pre></details></section>"
    )


def _environment_section(run: RunFolder) -> str:
    rows = [list(row) for row in run.environment]
    return markup.section(
        "Hardware and versions", "", markup.table([], rows, numeric_from=2) if rows else ""
    )


def _notices_section(notices: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in dict.fromkeys(notices))
    return markup.section(
        "What this page could not show",
        "",
        f'<ul class="notices">{items}</ul>' if items else "",
    )
