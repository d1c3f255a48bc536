"""``rlhfuse verify``: evidence that fusion changes when things run, not what is computed."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import click

from rlhfuse.cli.common import FAILURE, emit_json, stdout_kept_clean, user_errors
from rlhfuse.cli.runs import worker_errors


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--steps", default=2, show_default=True, type=click.IntRange(1))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
@click.pass_context
def verify(
    context: click.Context, config: str, overrides: Sequence[str], steps: int, as_json: bool
) -> None:
    """Run the first steps of CONFIG serially and fused, and compare hashes of all tokens, rewards
    and weights. Exits with 1 where they differ. Your run folder is not touched."""
    from rlhfuse.config_file import load
    from rlhfuse.launch import verify_run

    with (
        stdout_kept_clean(as_json),
        worker_errors(),
        user_errors(),
        tempfile.TemporaryDirectory(prefix="rlhfuse-verify-") as folder,
    ):
        result = verify_run(load(config, overrides), steps, Path(folder))
    if as_json:
        emit_json(result)
    else:
        for name in ("tokens", "rewards", "weights"):
            same = getattr(result, f"{name}_equal")
            click.echo(f"{name:8} {'identical' if same else 'DIFFERENT'}")
        click.echo(
            f"{result.steps} steps: serial {result.serial_s:.2f} s, fused {result.fused_s:.2f} s, "
            f"{result.speedup:.2f} times faster"
        )
        if result.first_difference:
            click.echo(f"first difference: {result.first_difference}")
    if not result.equal:
        context.exit(FAILURE)
