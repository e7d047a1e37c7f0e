"""The group of all commands: one place where errors become messages and exit codes, and help has sections."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import typer
from typer.core import TyperGroup

from gorgon_common import errors
from gorgon_common.cli import terminal

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

JSON = "gorgon.json"
DEBUG = "gorgon.debug"

SECTIONS = ("Begin", "Write workflows", "Run them", "Look things up", "Servers and upkeep")
"""Headings of `gorgon --help`, in order; a command names one as its `rich_help_panel`."""


class Group(TyperGroup):
    """Ends with a message and a code where a command raises; never with a traceback, unless --debug asks for it."""

    def invoke(self, ctx: Context) -> Any:
        """Run the command that the arguments ask for."""
        try:
            return super().invoke(ctx)
        except errors.GorgonError as error:
            if ctx.meta.get(DEBUG):
                raise
            if ctx.meta.get(JSON):
                terminal.emit(terminal.error_document(error))
            terminal.tell_error(error)
            raise typer.Exit(terminal.EXIT_BAD_INPUT) from None
        except (typer.TyperException, typer.Exit, typer.Abort, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.meta.get(DEBUG):
                raise
            terminal.note(f"This is a fault of Gorgon: {type(error).__name__}: {error}")
            terminal.note("`gorgon --debug …` shows where; please report it.")
            raise typer.Exit(terminal.EXIT_BUG) from None

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the commands by sections."""
        shown = [(name, command) for name, command in self.commands.items() if not command.hidden]
        width = max(len(name) for name, _ in shown)
        for section in SECTIONS:
            rows = [
                (name.ljust(width), command.get_short_help_str(formatter.width - width - 6))
                for name, command in shown
                if getattr(command, "rich_help_panel", None) == section
            ]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)
