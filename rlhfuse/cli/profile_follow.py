"""``rlhfuse profile --attach``: a run in progress, a line a step as its steps end."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec

if TYPE_CHECKING:
    from rlhfuse.profiler.summary import ProfileSummary

_POLL_S = 0.5
_TOP = 3


def follow(
    folder: Path,
    *,
    as_json: bool,
    stop_after_s: float | None,
    on_step: "Callable[[ProfileSummary], None]",
) -> None:
    """Print every step of a run as it ends, from now on (and the last one there is), until the
    run's report is written, nothing came for `stop_after_s`, or Ctrl-C.

    Raises:
        ValueError: `folder` is not a folder.
    """
    from rlhfuse.profiler.explain import explain
    from rlhfuse.profiler.readers.ours import open_run

    if not folder.is_dir():
        raise ValueError(f"--attach {folder}: no such run folder")
    click.echo(f"following {folder} (Ctrl-C ends)", err=True)
    for step in _steps(folder, stop_after_s):
        trace = open_run(folder)
        if step not in trace.steps:
            continue
        _, summary = explain(trace, step, critic_scale=None)
        if as_json:
            click.echo(msgspec.json.encode(summary).decode())
        else:
            click.echo(_line(summary))
        on_step(summary)


def _steps(folder: Path, stop_after_s: float | None) -> Iterator[int]:
    """Steps as their timelines appear, in order; the first is the last that is there already."""
    from rlhfuse.profiler.readers.ours import recorded_steps

    done: int | None = None
    waited_since = time.monotonic()
    began = time.time()
    while True:
        finished = _is_finished(folder, began)
        steps = recorded_steps(folder)
        fresh = steps[-1:] if done is None else [step for step in steps if step > done]
        for step in fresh:
            yield step
            done, waited_since = step, time.monotonic()
        if not fresh:
            if finished:
                return
            if stop_after_s is not None and time.monotonic() - waited_since > stop_after_s:
                return
        time.sleep(_POLL_S)


def _is_finished(folder: Path, began: float) -> bool:
    report = folder / "report.html"
    return report.is_file() and report.stat().st_mtime >= began


def _line(summary: "ProfileSummary") -> str:
    total = sum(summary.causes.values()) or 1.0
    work = {"generate", "prefill", "score", "reward", "forward", "backward", "compute"}
    work |= {"input_gradient", "weight_gradient", "optimizer", "advantage"}
    lost = [(s, n) for n, s in summary.causes.items() if n not in work]
    top = ", ".join(f"{n} {s / total:.0%}" for s, n in sorted(lost, reverse=True)[:_TOP])
    bubble = summary.bubble_fraction
    share = f"{bubble:.1%} not computing" if bubble is not None else "bubble not known"
    return f"step {summary.step}: {summary.wall_s:.3g} s, {share} ({top})"
