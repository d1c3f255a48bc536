"""``rlhfuse``: the entry point. Commands are loaded when asked for, so that help is instant."""

import gc
import importlib
import sys

import click

from rlhfuse.cli.common import run_command

# Command name -> module below rlhfuse.cli and the name of the click command in it.
COMMANDS: dict[str, tuple[str, str]] = {
    "train": ("train", "train"),
    "verify": ("verify", "verify"),
    "eval": ("evaluate", "evaluate"),
    "plan": ("plan", "plan"),
    "schedule": ("schedule", "schedule"),
    "profile": ("profile", "profile"),
    "report": ("report", "report"),
    "sft": ("prepare", "sft"),
    "reward-model": ("prepare", "reward_model"),
    "prepare-quickstart": ("prepare", "prepare_quickstart"),
    "import": ("import_verl", "import_config"),
    "doctor": ("doctor", "doctor"),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module_name, attribute = COMMANDS[cmd_name]
        module = importlib.import_module(f"rlhfuse.cli.{module_name}")
        command = getattr(module, attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=_LazyGroup)
@click.version_option(package_name="rlhfuse")
def cli() -> None:
    """RLHF training: same samples, same update, less idle time."""


def main() -> None:
    """Run the command line and exit with its code."""
    # Imports make some 500,000 objects that stay: with Python's own limits (700 new ones, 10, 10)
    # a quarter of their processor time goes into looking through them.
    gc.set_threshold(100_000, 20, 100)
    sys.exit(run_command(cli, sys.argv[1:]))


if __name__ == "__main__":
    main()
