"""What every command shares: how mistakes are told, how JSON is printed, the exit codes.

Exit codes: 0 success, 2 a user's mistake (one line on stderr, no traceback), 1 a failure of our
own, 3 where a condition that the user asked for holds.
"""

import contextlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import IO, Any

import click
import msgspec

OK = 0
FAILURE = 1
MISTAKE = 2
CONDITION = 3


class UserError(click.ClickException):
    """A user's mistake: what, where and the way out, in one line."""

    exit_code = MISTAKE

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {one_line(self.format_message())}", err=True)


def one_line(message: str) -> str:
    """`message` with line breaks and runs of blanks made single blanks."""
    return " ".join(message.split())


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that users' input causes into `UserError`.

    These are `ValueError` (a message of ours) and a file that is missing or cannot be used.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise UserError(f"{error.filename}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(error)) from error


@contextlib.contextmanager
def stdout_kept_clean(active: bool) -> Iterator[None]:
    """While `active`, what Python code prints on stdout goes to stderr (for ``--json``)."""
    with contextlib.redirect_stdout(sys.stderr) if active else contextlib.nullcontext():
        yield


def emit_json(obj: object) -> None:
    """Print one JSON object, and a line end, on stdout; numbers that JSON lacks become null."""
    click.echo(msgspec.json.encode(obj).decode())


def run_command(command: click.Command, args: Sequence[str]) -> int:
    """Run `command` and return the exit code; every error is told the way this module promises."""
    try:
        # A group without arguments is asked for its help; click would call that an error.
        given = list(args) or (["--help"] if isinstance(command, click.Group) else [])
        result = command.main(args=given, prog_name="rlhfuse", standalone_mode=False)
    except click.UsageError as error:
        place = f" ({error.ctx.command_path} --help)" if error.ctx else ""
        click.echo(f"error: {one_line(error.format_message())}{place}", err=True)
        return MISTAKE
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return FAILURE
    except Exception:
        traceback.print_exc()
        return FAILURE
    return result if isinstance(result, int) else OK
