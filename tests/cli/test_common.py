"""The promises of every command line: one line, one JSON object, the right exit code."""

import json
import sys
from collections.abc import Callable

import click
import pytest

from rlhfuse.cli.common import emit_json, run_command, stdout_kept_clean, user_errors


def _command(body: Callable[[], object]) -> click.Command:
    @click.group()
    def group() -> None:
        """A group."""

    @group.command()
    @click.option("--json", "as_json", is_flag=True)
    def go(as_json: bool) -> None:
        with user_errors(), stdout_kept_clean(as_json):
            body()
        if as_json:
            emit_json({"nan": float("nan"), "values": (1, 2)})

    return group


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("actor.path:\n  is missing"),
        FileNotFoundError(2, "No such file", "a.yaml"),
        click.BadParameter("not a number"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(_command(lambda: _raise(error)), ["go"]) == 2
    streams = capsys.readouterr()
    assert streams.out == ""
    assert streams.err.count("\n") == 1
    assert streams.err.startswith("error: ")
    assert "Traceback" not in streams.err


def test_an_unknown_option_is_one_line_and_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_command(lambda: None), ["go", "--nope"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "--nope" in err


def test_our_own_failure_shows_where_and_is_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_command(lambda: _raise(RuntimeError("broken"))), ["go"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_json_is_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    code = run_command(_command(lambda: sys.stdout.write("noise\n")), ["go", "--json"])
    streams = capsys.readouterr()
    assert code == 0
    assert json.loads(streams.out) == {"nan": None, "values": [1, 2]}
    assert streams.err == "noise\n"


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(_command(lambda: None), []) == 0
    assert "Usage" in capsys.readouterr().out


def test_a_command_may_choose_its_exit_code() -> None:
    def leave() -> None:
        click.get_current_context().exit(3)

    assert run_command(_command(leave), ["go"]) == 3
