"""``rlhfuse eval``: the validation sets of a run, on one of its checkpoints."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from rlhfuse.cli.common import emit_json, stdout_kept_clean, user_errors
from rlhfuse.cli.runs import worker_errors


@click.command(name="eval")
@click.argument("checkpoint", type=click.Path(file_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def evaluate(checkpoint: str, overrides: Sequence[str], as_json: bool) -> None:
    """Run the validation sets on CHECKPOINT (a run's folder, or one of its global_step_N).

    The run's own configuration applies; KEY=VALUE changes single keys of it.
    """
    from rlhfuse.launch import evaluate_checkpoint

    with (
        stdout_kept_clean(as_json),
        worker_errors(),
        user_errors(),
        tempfile.TemporaryDirectory(prefix="rlhfuse-eval-") as folder,
    ):
        metrics = evaluate_checkpoint(Path(checkpoint), overrides, Path(folder))
    if as_json:
        emit_json(metrics)
    else:
        for name, value in metrics.items():
            click.echo(f"{name:50} {value:.4f}")
