"""``rlhfuse report``: write a run's HTML report again."""

from pathlib import Path

import click

from rlhfuse.cli.common import UserError, emit_json, user_errors


@click.command()
@click.argument("run", type=click.Path(file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def report(run: str, as_json: bool) -> None:
    """Write report.html into RUN (a folder such as runs/rlhfuse/quickstart)."""
    from rlhfuse.report.page import write_report

    folder = Path(run)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run: no config.yaml there")
    with user_errors():
        path = write_report(folder)
    if as_json:
        emit_json({"report": str(path)})
    else:
        click.echo(path)
