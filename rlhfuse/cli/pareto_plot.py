"""Latency against peak memory as a picture."""

from collections.abc import Sequence
from pathlib import Path

from rlhfuse.schedules.pareto import Point

TALLEST = 2.5  # times the lower bound: where the axis ends


def save_pareto_plot(
    points: Sequence[Point],
    path: Path,
    lower_bound: float,
    others: Sequence[tuple[str, float, float]] = (),
) -> None:
    """Write the front as PNG or SVG.

    `others`: name, peak memory and makespan of schedules to compare with.

    Raises:
        ValueError: no task takes time, so there is nothing to draw.
    """
    if lower_bound <= 0:
        raise ValueError("no task of the problem takes time: there is no front to draw")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    memory = [point.peak_memory for point in points]
    times = [point.makespan for point in points]
    right = 1.06 * max([*memory, *(m for _, m, _ in others)])
    axes.step([*memory, right], [*times, times[-1]], where="post", color="#4a90c9", linewidth=1.6)
    top = min(TALLEST * lower_bound, 1.05 * max([*times, *(t for _, _, t in others)]))
    for point in points:
        inside = point.makespan <= top  # what is far slower stands at the upper edge
        at = (point.peak_memory, min(point.makespan, 0.985 * top))
        axes.plot(*([value] for value in at), "o" if inside else "^", color="#124d86", markersize=5)
        axes.annotate(
            f"{point.makespan:.4g}",
            at,
            xytext=(-4, -12) if inside else (7, -3),
            textcoords="offset points",
            ha="right" if inside else "left",
            fontsize=8,
            color="#124d86",
        )
    places: dict[tuple[float, float], list[str]] = {}
    for name, peak, length in others:
        places.setdefault((round(peak, 9), round(length, 9)), []).append(name)
    for place, names in places.items():
        if place[1] > top:
            continue
        axes.plot(*([value] for value in place), "s", color="#f5923e", markersize=5)
        axes.annotate(
            ", ".join(names),
            place,
            xytext=(6, -1),
            textcoords="offset points",
            fontsize=8,
            color="#a8480c",
        )
    axes.axhline(lower_bound, color="#555555", linestyle=(0, (5, 3)), linewidth=0.9)
    axes.annotate(
        f"lower bound {lower_bound:.5g}",
        (right, lower_bound),
        xytext=(-4, -11),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#555555",
    )
    axes.set_xlim(0, right)
    axes.set_yscale("log", base=2)
    axes.set_ylim(lower_bound * (lower_bound / top) ** 0.08, top)
    ticks = [
        k
        for k in (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.25, 2.5)
        if k * lower_bound <= axes.get_ylim()[1]
    ]
    axes.set_yticks([k * lower_bound for k in ticks], [f"{k:g}x" for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("peak memory of the fullest rank")
    axes.set_ylabel("makespan / lower bound")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
