"""The page that ``rlhfuse plan --html`` writes."""

from collections.abc import Sequence
from html import escape

from rlhfuse.planner.step import bubbles
from rlhfuse.planner.summary import Plan, PlanSummary
from rlhfuse.profiler.causes import Cause
from rlhfuse.report import charts, markup
from rlhfuse.report.lanes import lane_data
from rlhfuse.report.palette import CAUSES

_STAGES = (
    ("generation", "#0072b2"),
    ("inference", "#009e73"),
    ("training", "#d55e00"),
    ("other", "#7c8894"),
)


def render_plan(plan: Plan, title: str) -> str:
    """The page as text."""
    summary = plan.summary
    data = {
        "timeline-fused": lane_data(plan.fused, "Fused"),
        "timeline-serial": lane_data(plan.serial, "Serial"),
    }
    wall_s = max(view.wall_s for view in data.values())
    body = [
        _tiles(summary),
        markup.section(
            "The step that is predicted",
            "One device of each generation instance of a slice of the cluster. Full blocks are "
            "work; pale blocks with a line below are idle time, coloured by its cause. Both "
            "pictures have one scale.",
            *(markup.timeline_view(name, view, wall_s) for name, view in data.items()),
        ),
        _stages(summary),
        _idle(plan),
        _advice(summary),
        _memory(summary),
        _what_if(summary),
        _notes("What was assumed", summary.assumed),
        _notes("Warnings", summary.warnings),
    ]
    return markup.page(
        title=title,
        kicker="rlhfuse plan: predicted, not measured",
        lead=f"{summary.num_devices} x {summary.hardware}",
        body="\n".join(part for part in body if part),
        data=data,
    )


def _tiles(summary: PlanSummary) -> str:
    worth = summary.worthwhile
    memory = summary.memory_per_device
    tiles = [
        markup.tile("Fused against serial", f"{summary.speedup:.2f}\u00d7", "predicted"),
        markup.tile(
            "Time per step",
            f"{summary.step_s.fused:.3g} s",
            f"{summary.step_s.serial:.3g} s serial",
        ),
        markup.tile(
            "Inter-stage fusion",
            f"{worth.inter_stage.saving_fraction:.1%}" if worth.inter_stage.worthwhile else "no",
            "of the serial step saved" if worth.inter_stage.worthwhile else "does not pay",
        ),
        markup.tile(
            "Intra-stage fusion",
            f"{worth.intra_stage.saving_fraction:.1%}" if worth.intra_stage.worthwhile else "no",
            "of the serial step saved" if worth.intra_stage.worthwhile else "does not pay",
        ),
        markup.tile(
            "Memory per device",
            f"{memory.total / 1e9:.0f} GB",
            f"of {memory.capacity / 1e9:.0f} GB: " + ("fits" if summary.fits else "does not fit"),
        ),
    ]
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _stages(summary: PlanSummary) -> str:
    stacks = [
        charts.Stack(name, color, [summary.stages[name].serial_s, summary.stages[name].fused_s])
        for name, color in _STAGES
    ]
    rows = [
        [name, f"{pair.serial_s:.4g}", f"{pair.fused_s:.4g}", _ratio(pair.serial_s, pair.fused_s)]
        for name, pair in summary.stages.items()
    ]
    step = summary.step_s
    rows.append(["step", f"{step.serial:.4g}", f"{step.fused:.4g}", _ratio(*_both(summary))])
    return markup.section(
        "Stage by stage",
        "Inference is what scoring adds after the last response. Other: weights to the engines, "
        "and training state moved out of their way where it must be.",
        charts.stacked_bars(["serial", "fused"], stacks, "", "seconds", " s"),
        markup.table(["stage", "serial s", "fused s", "ratio"], rows, numeric_from=1, sum_row=True),
    )


def _both(summary: PlanSummary) -> tuple[float, float]:
    return summary.step_s.serial, summary.step_s.fused


def _ratio(serial_s: float, fused_s: float) -> str:
    return f"{serial_s / fused_s:.2f}" if fused_s > 0 else ""


def _idle(plan: Plan) -> str:
    serial, fused = bubbles(plan.serial), bubbles(plan.fused)
    names = sorted(
        {*serial, *fused}, key=lambda name: -max(serial.get(name, 0), fused.get(name, 0))
    )
    rows = [
        [CAUSES[Cause(name)].label, f"{serial.get(name, 0.0):.1%}", f"{fused.get(name, 0.0):.1%}"]
        for name in names
    ]
    rows.append(["all", f"{sum(serial.values()):.1%}", f"{sum(fused.values()):.1%}"])
    return markup.section(
        "Where devices do not compute",
        "Parts of each step's device time; the fused step is shorter.",
        markup.table(["cause", "serial", "fused"], rows, numeric_from=1, sum_row=True),
    )


def _advice(summary: PlanSummary) -> str:
    worth = summary.worthwhile
    rows = [[key, _value(value)] for key, value in summary.recommended.items()]
    told = [
        f"Inter-stage fusion: {worth.inter_stage.reason}.",
        f"Intra-stage fusion: {worth.intra_stage.reason}.",
        *(f"{text}." for text in summary.limits),
        *(f"Would help: {text}." for text in summary.next_steps),
    ]
    return markup.section(
        "Recommended, and what limits the step",
        "Keys of the configuration: planning with them again gives this plan.",
        "".join(f"<p>{escape(text)}</p>" for text in told),
        markup.table(["key", "value"], rows, numeric_from=1),
    )


def _value(value: int | float | str | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _memory(summary: PlanSummary) -> str:
    memory = summary.memory_per_device
    rows = [
        [label, f"{size / 1e9:.2f}"]
        for label, size in (
            ("weights, gradients, engine", memory.weights),
            ("optimizer", memory.optimizer),
            ("activations, while training", memory.activations),
            ("keys and values, while generating", memory.kv),
            ("most at one time", memory.total),
        )
    ]
    return markup.section(
        "Memory of one device",
        f"Of {memory.capacity / 1e9:.0f} GB. Activations and keys and values are never there "
        "together." + (" Training state waits in host memory." if memory.offloaded else ""),
        markup.table(["", "GB"], rows, numeric_from=1, sum_row=True),
    )


def _what_if(summary: PlanSummary) -> str:
    if not summary.what_if:
        return ""
    rows = [
        [
            row.name, f"{row.serial_s:.3g}", f"{row.fused_s:.3g}", f"{row.speedup:.2f}",
            f"{row.samples_per_s:.4g}",
        ]
        for row in summary.what_if
    ]  # fmt: skip
    return markup.section(
        "What if",
        "One condition changed at a time; sizes of instances and stages stay. Compared with a "
        "short search.",
        markup.table(
            ["", "serial s", "fused s", "ratio", "samples/s, fused"], rows, numeric_from=1
        ),
    )


def _notes(title: str, texts: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in texts)
    return markup.section(title, "", f'<ul class="notices">{items}</ul>' if items else "")
