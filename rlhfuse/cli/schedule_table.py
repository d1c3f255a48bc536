"""What ``rlhfuse schedule`` prints for people."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from rlhfuse.schedules.critical import Bubble
from rlhfuse.schedules.pareto import Point
from rlhfuse.schedules.summary import Explained, Summary

MOST_RANKS = 32  # rows of the table of ranks; beyond, only the sum
_CAUSES = [cause.value for cause in Bubble]


def _console() -> Console:
    """On a terminal as wide as that, elsewhere wide enough for whole lines."""
    return Console() if sys.stdout.isatty() else Console(width=120)


def print_summaries(lines: Sequence[tuple[str, Summary]]) -> None:
    """One line per policy, the first one in bold; the fastest is marked."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    table.add_column("policy", no_wrap=True)
    for name in ("makespan", "bound", "idle", "peak memory", "vs serial", "search"):
        table.add_column(name, justify="right")
    table.add_column("", no_wrap=True)
    fastest = min(line.makespan for _, line in lines)
    for number, (name, line) in enumerate(lines):
        notes = ["fastest"] if len(lines) > 1 and line.makespan == fastest else []
        notes += ["optimal"] if line.proven_optimal else []
        table.add_row(
            name,
            f"{line.makespan:.6g}",
            f"{line.lower_bound:.6g}",
            f"{100 * line.bubble_fraction:.1f} %",
            f"{line.peak_memory:.5g}",
            f"{line.serial_makespan / line.makespan:.3f}x" if line.makespan else "-",
            f"{line.seconds:.2f} s",
            ", ".join(notes),
            style="bold" if number == 0 else None,
        )
    _console().print(table)


def print_explained(explained: Explained) -> None:
    """Idle time per rank and cause, the critical path, and what noise costs."""
    console = _console()
    table = Table("idle time", box=None, padding=(0, 2, 0, 0))
    for cause in _CAUSES:
        table.add_column(cause.replace("_", "-"), justify="right")
    table.add_column("idle", justify="right")
    table.add_column("busy", justify="right")
    whole = sum(rank.busy + rank.idle for rank in explained.per_rank) or 1.0
    if len(explained.per_rank) <= MOST_RANKS:
        for rank in explained.per_rank:
            times = [rank.bubbles[cause] for cause in _CAUSES]
            wall = rank.busy + rank.idle or 1.0
            table.add_row(
                f"rank {rank.rank}",
                *(f"{time:.5g}" if time > 1e-9 * wall else "-" for time in times),
                f"{rank.idle:.5g}",
                f"{100 * rank.busy / wall:.1f} %",
            )
    busy = sum(rank.busy for rank in explained.per_rank)
    table.add_row(
        "all ranks",
        *(f"{100 * explained.bubbles[cause] / whole:.1f} %" for cause in _CAUSES),
        f"{100 * (1 - busy / whole):.1f} %",
        f"{100 * busy / whole:.1f} %",
        style="bold",
    )
    console.print()
    console.print(table)
    console.print()
    _print_path(console, explained)


def _print_path(console: Console, explained: Explained) -> None:
    path, length = explained.critical_path, explained.makespan or 1.0
    parts = [f"{name} {100 * time / length:.0f} %" for name, time in path.pipelines.items()]
    if path.waits > 0:
        parts.append(f"links and releases {100 * path.waits / length:.1f} %")
    ends = f"{path.tasks[0]} ... {path.tasks[-1]}" if path.tasks else "none"
    console.print(f"critical path: {', '.join(parts)}; {len(path.tasks)} tasks, {ends}")
    least = explained.memory_lower_bound
    console.print(f"no schedule this fast has a lower peak memory than {least:.5g}")
    noise = explained.noise
    console.print(
        f"with {100 * noise.noise:g} % noise: {noise.mean:.6g} on average "
        f"({100 * noise.loss:+.1f} %), 95 % of runs within {noise.p95:.6g}"
    )


def print_front(front: Sequence[Point], lower_bound: float) -> None:
    """Latency against memory."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("peak memory", "makespan", "above bound"):
        table.add_column(name, justify="right")
    for point in front:
        over = point.makespan / lower_bound - 1 if lower_bound else 0.0
        table.add_row(f"{point.peak_memory:.5g}", f"{point.makespan:.6g}", f"{100 * over:.1f} %")
    _console().print(table)
