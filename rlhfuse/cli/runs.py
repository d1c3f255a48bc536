"""What the commands share that start workers."""

import contextlib
from collections.abc import Iterator

import click

from rlhfuse.cli.common import UserError


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """Tell a worker's failure in one line: exit code 2 for the user's mistake, else 1."""
    from rlhfuse.fleet import WorkerFailed

    try:
        yield
    except WorkerFailed as error:
        if error.user_error:
            raise UserError(str(error)) from error
        raise click.ClickException(str(error)) from error
