"""``rlhfuse train``: a run from a configuration."""

from collections.abc import Sequence

import click

from rlhfuse.cli.common import emit_json, stdout_kept_clean, user_errors
from rlhfuse.cli.runs import worker_errors


@click.command()
@click.argument("config", type=click.Path(dir_okay=False))
@click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option("--dry-run", is_flag=True, help="Resolve, check and predict; start nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def train(
    config: str, overrides: Sequence[str], resume: bool, dry_run: bool, as_json: bool
) -> None:
    """Train as CONFIG says; KEY=VALUE changes single keys, such as actor.optim.lr=1e-5."""
    # Imported late: `rlhfuse --help` must not wait for torch.
    from rlhfuse.config_file import load
    from rlhfuse.dry_run import describe
    from rlhfuse.launch import Summary, train_run
    from rlhfuse.resolve import resolve

    with stdout_kept_clean(as_json), worker_errors(), user_errors():
        run = resolve(load(config, overrides))
        plan = describe(run)
        if not as_json:
            click.echo(plan.text(), err=not dry_run)
        summary: Summary | None = None if dry_run else train_run(run, resume=resume)
    if as_json:
        emit_json(plan if summary is None else summary)
    elif summary is not None:
        click.echo(summary.text())
