"""What a person sees while a run works: a live display, or plain lines without a terminal.

Everything goes to stderr, so that stdout stays free for ``--json``. Nothing else of a run prints.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlhfuse import messages as m

PLAIN_INTERVAL_S = 10.0
_REFRESH_HZ = 4

# What a finished step's line shows, where the step has it: metric, label, format.
_HEADLINES = (
    ("critic/rewards/mean", "reward", "{:.3f}"),
    ("critic/score/mean", "score", "{:.3f}"),
    ("critic/kl", "kl", "{:.4f}"),
    ("response_length/mean", "length", "{:.0f}"),
    ("timing_s/step", "step", "{:.1f} s"),
    ("timing_s/gen", "gen", "{:.1f}"),
    ("timing_s/update", "train", "{:.1f}"),
    ("perf/idle_fraction", "idle", "{:.0%}"),
    ("fusion/measured_speedup", "fused/serial", "x{:.2f}"),
)


@dataclass(slots=True)
class _Stage:
    """One stage of the step in progress."""

    name: str
    done: int
    total: int
    detail: str


@dataclass(slots=True)
class _Written:
    """What plain lines have said of a stage: when last (or when it began), and whether all."""

    since_s: float
    lines: int = 0
    complete: bool = False


class Progress:
    """The progress of one run; use it as a context manager.

    On a terminal the last lines are redrawn in place. Elsewhere a stage that takes longer than
    `PLAIN_INTERVAL_S` seconds writes a plain line that often, and one when it is complete.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        done_steps: int = 0,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._clock = clock
        self._total_steps = total_steps
        self._first_step = done_steps
        self._done_steps = done_steps
        self._run_began_s = clock()
        self._tokens_before: tuple[float, int] | None = None
        self._stages: dict[str, _Stage] = {}
        self._written: dict[str, _Written] = {}
        self._live = (
            Live(
                console=self._console,
                get_renderable=self._render,
                refresh_per_second=_REFRESH_HZ,
                transient=True,
            )
            if self._console.is_terminal
            else None
        )

    def __enter__(self) -> "Progress":
        self._run_began_s = self._clock()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def generation(self, done: int, total: int, tokens: int, tail: int) -> None:
        """`tokens` generated so far in this step; `tail`: samples that were moved together."""
        now = self._clock()
        if self._tokens_before is None or tokens < self._tokens_before[1]:
            self._tokens_before = (now, tokens)
        began_s, before = self._tokens_before
        rate = (tokens - before) / (now - began_s) if now > began_s else 0.0
        moved = f", tail of {tail} moved together" if tail else ""
        self._show(_Stage("generation", done, total, f"{rate:,.0f} tokens/s{moved}"))

    def scoring(self, done: int, total: int) -> None:
        """Samples whose scores are all known."""
        self._show(_Stage("scoring", done, total, ""))

    def groups(self, done: int, total: int) -> None:
        """Groups whose forward and backward passes are done, while others still generate."""
        self._show(_Stage("training", done, total, "groups"))

    def training(self, done: int, total: int, losses: Mapping[str, float]) -> None:
        """Micro-batches of this step, of all roles; `losses` of the last mini-batch by role."""
        shown = [f"{role} loss {loss:.4f}" for role, loss in sorted(losses.items())]
        self._show(_Stage("training", done, total, ", ".join(["micro-batches", *shown])))

    def step_finished(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the step's line; `step` counts from 1."""
        self._done_steps = step
        self._stages.clear()
        self._written.clear()
        self._tokens_before = None
        shown = [
            f"{label} {form.format(metrics[name])}"
            for name, label, form in _HEADLINES
            if name in metrics
        ]
        validation = [
            f"{name} {value:.3f}" for name, value in metrics.items() if name.startswith("val-core/")
        ]
        left = [f"eta {_duration(self.eta_s)}"] if step < self._total_steps else []
        head = f"step {step}/{self._total_steps}"
        self.note("  ".join([head, *shown, *validation, *left]))

    def note(self, text: str) -> None:
        """Write a line that stays; control characters are shown as ``?``."""
        safe = "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)
        self._console.print(Text(safe), soft_wrap=True)

    @property
    def eta_s(self) -> float:
        """Seconds to the end of the run, at the pace so far."""
        ran = self._done_steps - self._first_step
        if ran <= 0:
            return float("inf")
        left = max(0, self._total_steps - self._done_steps)
        return (self._clock() - self._run_began_s) / ran * left

    def _show(self, stage: _Stage) -> None:
        self._stages[stage.name] = stage
        if self._live is None:
            self._write_plain(stage)

    def _write_plain(self, stage: _Stage) -> None:
        """Say nothing of what is over within an interval: a short step is one line."""
        now, complete = self._clock(), stage.done >= stage.total
        written = self._written.setdefault(stage.name, _Written(since_s=now))
        if written.complete or (not complete and now - written.since_s < PLAIN_INTERVAL_S):
            return
        written.complete = complete
        if complete and not written.lines and now - written.since_s < PLAIN_INTERVAL_S:
            return
        written.since_s = now
        written.lines += 1
        detail = f", {stage.detail}" if stage.detail else ""
        step = min(self._done_steps + 1, self._total_steps)
        self.note(
            f"step {step}/{self._total_steps}: {stage.name} {stage.done}/{stage.total}{detail}"
        )

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for stage in self._stages.values():
            table.add_row(
                Text(stage.name),
                ProgressBar(total=max(1, stage.total), completed=stage.done, width=24),
                Text(f"{stage.done}/{stage.total}"),
                Text(stage.detail, style="dim"),
            )
        eta = "" if self.eta_s == float("inf") else f"eta {_duration(self.eta_s)}"
        table.add_row(
            Text("steps", style="bold"),
            ProgressBar(total=max(1, self._total_steps), completed=self._done_steps, width=24),
            Text(f"{self._done_steps}/{self._total_steps}"),
            Text(eta, style="dim"),
        )
        return Group(table)


class TrainingWatch:
    """The progress of an update, from what each rank says of its own stages."""

    def __init__(self, progress: Progress, num_microbatches: int, ranks: Sequence[str]) -> None:
        """`num_microbatches`: of all roles and mini-batches; `ranks`: the training workers."""
        self._progress = progress
        self._total = num_microbatches
        self._shares = dict.fromkeys(ranks, 0.0)
        self._losses: dict[str, float] = {}
        self._show(0)

    def heard(self, worker: str, event: m.Event) -> None:
        """A rank's word. The slowest rank counts: what it has not done is not done."""
        assert isinstance(event, m.Training), f"{worker} said {type(event).__name__} in an update"
        self._shares[worker] = event.done / event.total if event.total else 1.0
        self._losses.update(event.losses)
        done = int(min(self._shares.values()) * self._total)
        self._show(done)

    def finish(self) -> None:
        """Every rank has answered."""
        self._show(self._total)

    def _show(self, done: int) -> None:
        if self._total:  # else groups have been trained before
            self._progress.training(done, self._total, self._losses)


def _duration(seconds: float) -> str:
    if seconds == float("inf"):
        return "unknown"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
