"""The progress display: plain lines without a terminal, redrawn lines with one."""

import io

from rich.console import Console

from rlhfuse import messages as m
from rlhfuse.progress import PLAIN_INTERVAL_S, Progress, TrainingWatch


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _plain(total_steps: int, clock: _Clock, done: int = 0) -> tuple[Progress, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, width=200)
    return Progress(total_steps, done_steps=done, console=console, clock=clock), out


def test_plain_lines_are_few_and_end_with_the_last_state() -> None:
    clock = _Clock()
    progress, out = _plain(3, clock)
    with progress:
        for done in range(101):
            clock.now = done * 0.25
            progress.generation(done, 100, tokens=done * 50, tail=4 if done > 90 else 0)
        progress.generation(100, 100, tokens=5000, tail=4)
    lines = out.getvalue().splitlines()
    assert len(lines) == 25 // PLAIN_INTERVAL_S + 1
    assert lines[-1] == ("step 1/3: generation 100/100, 200 tokens/s, tail of 4 moved together")
    assert "\x1b" not in out.getvalue()


def test_every_step_starts_its_stages_anew() -> None:
    clock = _Clock()
    progress, out = _plain(2, clock)
    with progress:
        for step in (1, 2):
            progress.generation(0, 8, tokens=0, tail=0)
            clock.now += 12
            progress.generation(8, 8, tokens=80, tail=0)
            progress.training(0, 4, {})
            clock.now += 12
            progress.training(4, 4, {"actor": 0.5})
            progress.scoring(0, 4)
            progress.scoring(4, 4)
            progress.step_finished(
                step, {"timing_s/step": 24.0, "val-core/set/reward/mean@1": 0.25}
            )
    text = out.getvalue()
    assert text.count("generation 8/8, 7 tokens/s") == 2
    assert "scoring" not in text  # it took no time
    assert "step 2/2: training 4/4, micro-batches, actor loss 0.5000" in text
    assert "step 1/2  step 24.0 s  val-core/set/reward/mean@1 0.250  eta 0:24" in text
    assert "eta" not in text.splitlines()[-1]


def test_the_estimate_counts_only_steps_of_this_run() -> None:
    clock = _Clock()
    progress, _ = _plain(110, clock, done=100)
    with progress:
        assert progress.eta_s == float("inf")
        clock.now = 30.0
        progress.step_finished(103, {})
        assert progress.eta_s == 70.0


def test_text_is_shown_as_it_is() -> None:
    """Neither console markup nor control sequences in a note have an effect."""
    progress, out = _plain(1, _Clock())
    with progress:
        progress.note("[bold red]sample[/bold red] [link=x] 100% \x1b[2J")
    assert out.getvalue() == "[bold red]sample[/bold red] [link=x] 100% ?[2J\n"


def test_a_terminal_gets_bars_that_are_cleared_and_lines_that_stay() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None)
    with Progress(4, console=console) as progress:
        progress.scoring(3, 6)
        progress.step_finished(1, {"critic/rewards/mean": 0.5})
        progress.training(1, 2, {"actor": 1.25, "critic": 0.5})
    text = out.getvalue()
    assert "step 1/4  reward 0.500  eta" in text
    assert "training" in text
    assert "actor loss 1.2500, critic loss 0.5000" in text
    assert "\x1b[" in text  # it moved the cursor: drawn in place


def test_the_slowest_rank_says_how_far_an_update_is() -> None:
    clock = _Clock()
    progress, out = _plain(1, clock)
    with progress:
        watch = TrainingWatch(progress, 8, ("training-0", "training-1"))
        for worker, done in (("training-0", 4), ("training-1", 2), ("training-1", 4)):
            clock.now += PLAIN_INTERVAL_S
            watch.heard(worker, m.Training(done=done, total=4, losses={"actor": 0.25}))
        watch.finish()
    shown = [line.split(",")[0] for line in out.getvalue().splitlines()]
    assert shown == [f"step 1/1: training {k}/8" for k in (0, 4, 8)]
