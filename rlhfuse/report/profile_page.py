"""The page that ``rlhfuse profile --html`` writes."""

from collections.abc import Sequence
from html import escape

from rlhfuse.profiler.attribution import StepAttribution
from rlhfuse.profiler.causes import IDLE, MOVEMENT, WORK, Cause
from rlhfuse.profiler.held import held_microbatches
from rlhfuse.profiler.summary import ProfileSummary, WhatIf
from rlhfuse.profiler.table import SpanTable
from rlhfuse.report import charts, markup
from rlhfuse.report.lanes import lane_data
from rlhfuse.report.palette import CAUSES
from rlhfuse.timeline import Timeline, lane_order

_COLOR = "#0072b2"
_RANKS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#d55e00", "#a8457f")
_MOST_POINTS = 600


def render_profile(
    summary: ProfileSummary,
    timeline: Timeline | SpanTable,
    title: str,
    trend: Sequence[tuple[int, StepAttribution]] = (),
) -> str:
    """The page as text. `trend`: the attributions of several steps, where there are several."""
    name = "All" if summary.step is None else f"Step {summary.step}"
    data = lane_data(timeline, name)
    ranks = f"{summary.num_ranks} ranks" if summary.num_ranks != 1 else "1 lane"
    body = [
        _tiles(summary),
        markup.section(
            "Rank by rank",
            "Full blocks are work; pale blocks with a line below are idle time, coloured by its "
            "cause; arrows are messages between tasks, shown where there are not too many. Click a "
            "name below the picture to hold it up.",
            markup.timeline_view("timeline", data),
        ),
        _causes(summary),
        _what_if(summary),
        _trend(trend),
        _memory(SpanTable.of(timeline)),
        _ranks(summary),
        _warnings(summary),
    ]
    return markup.page(
        title=title,
        kicker="rlhfuse profile",
        lead=f"{summary.format}, {ranks}, {name.lower()}",
        body="\n".join(part for part in body if part),
        data={"timeline": data},
    )


def _tiles(summary: ProfileSummary) -> str:
    ran = summary.schedule
    bubble = summary.bubble_fraction
    best = max(summary.what_if, key=lambda x: x.saving_fraction, default=None)
    total = sum(summary.causes.values()) or 1.0
    lost = [name for name in summary.causes if Cause(name) not in WORK]
    largest = max(lost, key=summary.causes.__getitem__, default=None)
    tiles = [
        markup.tile(
            "Not computing",
            f"{bubble:.1%}" if bubble is not None else None,
            "bubble fraction, mean over ranks" if bubble is not None else "see the notes below",
        ),
        markup.tile("Wall time", f"{summary.wall_s:.4g} s", "of this step"),
        markup.tile(
            "Largest cause",
            f"{summary.causes[largest] / total:.1%}" if largest else None,
            CAUSES[Cause(largest)].label if largest else "nothing was idle",
        ),
        markup.tile(
            "Schedule that ran",
            ran.name.partition(" (")[0] if ran else None,
            f"{_counts(ran.stages)} stages, {_counts(ran.microbatches)} micro-batches"
            if ran
            else "tasks are not named",
        ),
    ]
    if best is not None and best.saving_fraction > 0:
        tiles.append(markup.tile("Could be saved", f"{best.saving_fraction:.0%}", best.name))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _counts(numbers: Sequence[int]) -> str:
    return " + ".join(str(number) for number in numbers)


def _causes(summary: ProfileSummary) -> str:
    total = sum(summary.causes.values()) or 1.0
    rows = [
        [CAUSES[cause].label, kind, f"{summary.causes[cause.value]:.4g}", f"{share:.1f} %"]
        for kind, causes in (("work", WORK), ("movement", MOVEMENT), ("idle", IDLE))
        for cause in sorted(causes, key=lambda c: -summary.causes.get(c.value, 0.0))
        if (share := 100 * summary.causes.get(cause.value, 0.0) / total) > 0
    ]
    rows.append(["all", "", f"{sum(summary.causes.values()):.4g}", "100.0 %"])
    names = [f"rank {rank.rank}" for rank in summary.per_rank]
    used = [c for c in (*IDLE, *MOVEMENT) if any(c.value in r.causes for r in summary.per_rank)]
    stacks = [
        charts.Stack(
            CAUSES[cause].label,
            CAUSES[cause].color,
            [
                100 * rank.causes.get(cause.value, 0.0) / rank.wall_s if rank.wall_s > 0 else 0.0
                for rank in summary.per_rank
            ],
        )
        for cause in used
    ]
    return markup.section(
        "Where the time went",
        "Every moment of every rank has exactly one cause. The picture leaves the computing out.",
        charts.stacked_bars(names, stacks, "", "% of wall time", " %"),
        markup.table(["cause", "", "device-seconds", "share"], rows, numeric_from=2, sum_row=True),
    )


def _what_if(summary: ProfileSummary) -> str:
    if not summary.what_if:
        return ""
    ran = summary.schedule
    rows = [
        charts.Bar(
            what.name,
            max(0.0, what.saving_fraction),
            _COLOR,
            f"{what.saving_fraction:+.1%}  ({what.makespan_s:.4g} s{_of_bubble(what)})",
        )
        for what in summary.what_if
    ]
    why = (
        "Share of the step's time that would be saved: the same step, replayed with the measured "
        "costs and delays under one other condition."
    )
    if any("with a critic" in what.name for what in summary.what_if):
        why += " Fusing with a critic is compared with training both one after the other."
    if summary.what_if_note:
        why += f" O{summary.what_if_note[1:]}."
    ideal = (
        [
            f"The schedule that ran would ideally take {ran.ideal_makespan_s:.4g} s of training; "
            f"it took {ran.makespan_s:.4g} s."
        ]
        if ran
        else []
    )
    told = "".join(f"<p>{escape(text)}</p>" for text in [*ideal, *(ran.stragglers if ran else [])])
    return markup.section("What if", why, charts.bars(rows, label_width=470), told)


def _memory(table: SpanTable) -> str:
    """Micro-batches in flight on some ranks, first to last."""
    curves = held_microbatches(table)
    lanes = sorted(curves, key=lane_order)
    if not lanes:
        return ""
    shown = [lanes[round(i * (len(lanes) - 1) / 5)] for i in range(6)]
    lines = []
    for color, lane in zip(_RANKS, dict.fromkeys(shown), strict=False):
        points: list[tuple[float, float]] = []
        curve = curves[lane]
        for moment, held in curve[:: max(1, len(curve) // _MOST_POINTS)]:
            if points:
                points.append((moment - table.begin_s, points[-1][1]))
            points.append((moment - table.begin_s, held))
        lines.append(charts.Line(lane, color, points))
    peaks = ", ".join(f"{lane} {max(n for _, n in curves[lane])}" for lane in lanes[:16])
    more = f" and {len(lanes) - 16} more" if len(lanes) > 16 else ""
    return markup.section(
        "Activations held",
        "Micro-batches whose activations a rank holds: from the start of the forward pass to the "
        f"end of the backward pass (or of the weight gradient). Most at once: {peaks}{more}.",
        f'<div class="two">{charts.line_chart(lines, [], "seconds", "micro-batches")}</div>',
    )


def _of_bubble(what: WhatIf) -> str:
    share = what.bubble_recovered
    return f", {share:.0%} of the bubble" if share is not None and what.saving_fraction > 0 else ""


def _trend(trend: Sequence[tuple[int, StepAttribution]]) -> str:
    if len(trend) < 2:
        return ""
    used = [c for c in (*IDLE, *MOVEMENT) if any(c in step.causes for _, step in trend)]
    stacks = [
        charts.Stack(
            CAUSES[cause].label,
            CAUSES[cause].color,
            [
                100 * step.causes.get(cause, 0.0) / max(1e-12, step.wall_s * len(step.lanes))
                for _, step in trend
            ],
        )
        for cause in used
    ]
    names = [f"step {number}" for number, _ in trend]
    chart = charts.stacked_bars(names, stacks, "step", "% of device time", " %")
    return markup.section("Step by step", "", chart)


def _ranks(summary: ProfileSummary) -> str:
    rows = [
        [
            f"rank {rank.rank}",
            f"{rank.wall_s:.4g}",
            f"{rank.compute_s:.4g}",
            f"{rank.idle_s:.4g}",
            f"{rank.idle_s / rank.wall_s:.1%}" if rank.wall_s > 0 else "",
        ]
        for rank in summary.per_rank
    ]
    head = ["", "wall s", "compute s", "not computing s", "share"]
    return markup.section("Ranks", "", markup.table(head, rows, numeric_from=1))


def _warnings(summary: ProfileSummary) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in summary.warnings)
    return markup.section("Notes", "", f'<ul class="notices">{items}</ul>' if items else "")
