"""``rlhfuse sft``, ``rlhfuse reward-model``, ``rlhfuse prepare-quickstart``."""

import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from rlhfuse.cli.common import emit_json, stdout_kept_clean, user_errors


class _Show:
    """Training steps as a live bar, or as a plain line every five seconds without a terminal."""

    def __init__(self) -> None:
        self.bar = Bar(
            TextColumn("{task.description:>8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"),
            TimeElapsedColumn(),
            console=Console(stderr=True),
        )
        self.last_line_s = 0.0

    def step(self, name: str, step: int, num_steps: int, loss: float) -> None:
        if sys.stderr.isatty():
            self._step_bar(name, step, num_steps, loss)
        elif step == num_steps or time.monotonic() - self.last_line_s > 5:
            self.last_line_s = time.monotonic()
            click.echo(f"{name}: step {step}/{num_steps}, loss {loss:.3f}", err=True)

    def _step_bar(self, name: str, step: int, num_steps: int, loss: float) -> None:
        known = {task.description: task.id for task in self.bar.tasks}
        self.bar.start()
        task = known[name] if name in known else self.bar.add_task(name, total=num_steps, loss=loss)
        self.bar.update(task, completed=step, loss=loss)

    def close(self) -> None:
        self.bar.stop()


_FOLDER = click.Path(path_type=Path, file_okay=False)
_FILE = click.Path(path_type=Path, dir_okay=False)
Command = Callable[..., None]


def _training_options(command: Command) -> Command:
    """What every supervised training can be told."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout."),
        click.option("--seed", type=int, default=1, show_default=True),
        click.option("--max-length", type=int, default=1024, show_default=True),
        click.option("--batch-tokens", type=int, default=2048, show_default=True),
        click.option("--lr", type=float, default=1e-4, show_default=True),
        click.option("--epochs", type=float, default=1.0, show_default=True),
    ):
        command = option(command)
    return command


@click.command("sft")
@click.argument("model", type=_FOLDER)
@click.argument("rows", type=_FILE)
@click.argument("output", type=_FOLDER)
@_training_options
def sft(
    model: Path,
    rows: Path,
    output: Path,
    epochs: float,
    lr: float,
    batch_tokens: int,
    max_length: int,
    seed: int,
    as_json: bool,
) -> None:
    """Fine-tune the causal language model in folder MODEL on ROWS and save it to folder OUTPUT.

    ROWS is JSONL: {"prompt": text or chat messages, "response": text}.
    """
    _train("finetune", model, rows, output, (epochs, lr, batch_tokens, max_length, seed), as_json)


@click.command("reward-model")
@click.argument("model", type=_FOLDER)
@click.argument("pairs", type=_FILE)
@click.argument("output", type=_FOLDER)
@_training_options
def reward_model(
    model: Path,
    pairs: Path,
    output: Path,
    epochs: float,
    lr: float,
    batch_tokens: int,
    max_length: int,
    seed: int,
    as_json: bool,
) -> None:
    """Train a reward model on preference PAIRS, from the weights in folder MODEL, into OUTPUT.

    PAIRS is JSONL: {"prompt": text or chat messages, "chosen": text, "rejected": text}.
    """
    _train("reward", model, pairs, output, (epochs, lr, batch_tokens, max_length, seed), as_json)


def _train(
    kind: str,
    model: Path,
    rows: Path,
    output: Path,
    numbers: tuple[float, float, int, int, int],
    as_json: bool,
) -> None:
    # Imported late: torch and transformers take seconds, and help must be instant.
    from rlhfuse.training import supervised

    epochs, lr, batch_tokens, max_length, seed = numbers
    show = _Show()
    run = supervised.finetune if kind == "finetune" else supervised.train_reward_model
    with user_errors(), stdout_kept_clean(as_json):
        settings = supervised.SupervisedSettings(
            epochs=epochs,
            learning_rate=lr,
            batch_tokens=batch_tokens,
            max_length=max_length,
            seed=seed,
        )
        try:
            result = run(
                model,
                rows,
                output,
                settings,
                lambda p: show.step(kind, p.step, p.num_steps, p.loss),
            )
        finally:
            show.close()
    if as_json:
        emit_json(asdict(result))
        return
    held_out = "" if result.held_out_loss is None else f", held-out loss {result.held_out_loss:.3f}"
    if result.held_out_accuracy is not None:
        held_out += f", held-out accuracy {result.held_out_accuracy:.3f}"
    click.echo(f"{output}: {len(result.losses)} steps in {result.seconds:.1f} s{held_out}")


@click.command("prepare-quickstart")
@click.option("--folder", type=_FOLDER, default=Path("assets/quickstart"), show_default=True)
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout.")
def prepare_quickstart(folder: Path, seed: int, threads: int, as_json: bool) -> None:
    """Make the quick start's data, tokenizer, policy and reward model (once; then it is kept)."""
    from rlhfuse.quickstart import prepare

    show = _Show()
    with user_errors(), stdout_kept_clean(as_json):
        try:
            done = prepare.prepare(
                folder,
                prepare.QuickstartSettings(seed=seed),
                num_threads=threads,
                on_step=lambda name, p: show.step(name, p.step, p.num_steps, p.loss),
            )
        finally:
            show.close()
    if as_json:
        emit_json(asdict(done))
        return
    click.echo(
        f"{done.folder}: {'made' if done.fresh else 'already there'}; "
        f"policy loss {done.policy_loss:.3f} ({done.policy_s:.0f} s), "
        f"reward model right on {done.reward_accuracy:.0%} of held-out pairs "
        f"({done.reward_s:.0f} s)"
    )
