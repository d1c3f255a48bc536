"""Every command that the help names exists and explains itself."""

import subprocess
import sys

import click
import pytest

from rlhfuse.cli.common import run_command
from rlhfuse.cli.main import COMMANDS, cli


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, [name, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from rlhfuse.cli.main import cli; "
        "cli.main(['train', '--help'], standalone_mode=False); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_an_unknown_command_is_the_users_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli, ["trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_commands_are_click_commands() -> None:
    context = click.Context(cli)
    assert all(isinstance(cli.get_command(context, name), click.Command) for name in COMMANDS)
