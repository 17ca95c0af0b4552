"""The command `dora-dynamics`: a thin list of commands, each loaded when it is called.

Exit codes: 0 done, 1 could not be done, 2 wrong usage or unusable input.
"""

from __future__ import annotations

import sys
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Final

import click

from dora_dynamics import __version__
from dora_dynamics.errors import InputError
from dora_dynamics.shown_text import in_one_line

COMMANDS: Final = {
    "compare": "Measure how checkpoints differ from their base.",
    "sites": "List the weights of a model that can be followed.",
    "runs": "Say what run directories hold.",
    "coupling": "How ΔM goes with ΔD in recorded runs, with intervals.",
    "diagnose": "Whether a method changes weights as LoRA does or as full fine-tuning.",
    "plot": "Draw the paper's figure, and others, from recorded runs.",
    "report": "Write one HTML page of recorded runs, to explore offline.",
}
"""Each command and its one line of help; the command NAME is `NAME` in `commands/NAME.py`."""


class LazyGroup(click.Group):
    """A group whose commands are imported only when they run, so that `--help` is quick."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the commands, in the order they are listed."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"dora_dynamics.commands.{cmd_name}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command of that name; a mistyped one is told what it resembles."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = get_close_matches(args[0], COMMANDS, n=1)
            if not near or "Did you mean" in error.message:
                raise
            raise click.UsageError(f"{error.message} Did you mean '{near[0]}'?", ctx) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; unusable input is one line and exit code 2."""
        try:
            return super().invoke(ctx)
        except InputError as error:
            click.echo(f"Error: {in_one_line(str(error))}", err=True)
            sys.exit(2)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"Error: {in_one_line(f'{where}{error.strerror or error}')}", err=True)
            sys.exit(1)


@click.command(cls=LazyGroup)
@click.version_option(__version__, prog_name="dora-dynamics")
def main() -> None:
    """How fine-tuning changes weights: magnitude and direction, as in the DoRA paper."""
