"""Commands and their groups: turns errors into messages and exit codes, and formats help."""

from __future__ import annotations

import errno
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup, TyperOption

from gorgon_common import errors
from gorgon_common.cli import terminal
from gorgon_common.masking import redact

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

JSON = "gorgon.json"
DEBUG = "gorgon.debug"

SECTIONS = ("Begin", "Write workflows", "Run them", "Look things up", "Servers and upkeep")
"""Headings of `gorgon --help`, in order; a command names one as its `rich_help_panel`."""


_REASONS: dict[int, str] = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Free some space there, or use another disk."),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "Let this user have access, or name another place."),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "Allow more open files (ulimit -n), or lower GORGON_SLOTS."),
    **dict.fromkeys((errno.ENOMEM, errno.EAGAIN), "Free memory or end other processes, or lower GORGON_SLOTS."),
    **dict.fromkeys((errno.EIO, errno.ENODEV, errno.ENXIO), "Check the disk."),
    **dict.fromkeys(
        (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE),
        "Correct the path, or make what is missing; TMPDIR and GORGON_HOME name folders that Gorgon uses.",
    ),
}
"""Error of the operating system → how to fix it."""


class Fault(errors.GorgonError):
    """Something in Gorgon is broken."""


def environment_fault(error: Exception) -> errors.ConfigurationError | None:
    """Return the error to show if the operating system refused something; None if the fault is in Gorgon."""
    if isinstance(error, MemoryError):
        return errors.ConfigurationError("There is not enough memory.", hint=_REASONS[errno.ENOMEM])
    if not isinstance(error, OSError) or error.errno not in _REASONS:
        return None
    where = f": {error.filename}" if error.filename not in (None, "") else ""
    return errors.ConfigurationError(f"{error.strerror}{where}.", hint=_REASONS[error.errno])


_METAVARS = {"int": "N", "float": "NUMBER"}
"""Placeholders for values in help, for options that do not name their own; a text gets the name of the option."""
_BOUNDS = re.compile(r"\[(.*; )?(?:([-\d.]+)<=x<=([-\d.]+)|x>=([-\d.]+)|x<=([-\d.]+))\]$")


def _in_words(found: re.Match[str]) -> str:
    """Return a range of numbers as people say it: `1<=x<=200` is "1 to 200"."""
    before, low, high, least, most = found.groups(default="")
    words = f"{low} to {high}" if low else f"at least {least}" if least else f"at most {most}"
    return f"[{before}{words}]"


def examples(*lines: str) -> dict[str, Any]:
    """Return the settings that add examples to the end of a command's help; each line can be run as it is."""
    return {"cls": Command, "epilog": "\n".join(lines)}


def _write_examples(epilog: str | None, formatter: HelpFormatter) -> None:
    lines = (epilog or "").splitlines()
    if lines:
        with formatter.section("Example" if len(lines) == 1 else "Examples"):
            for line in lines:
                formatter.write(f"{' ' * formatter.current_indent}{line}\n")


class Command(TyperCommand):
    """A command whose epilog is a list of examples, one per line."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for param in self.params:
            if isinstance(param, TyperOption) and param.metavar is None:
                name = max(param.opts, key=len).lstrip("-").upper()
                param.metavar = name if param.bare_type() == "str" else _METAVARS.get(param.bare_type())

    def collect_usage_pieces(self, ctx: Context) -> list[str]:
        """Return what follows the command's name; a value that is required needs no brackets."""
        return [re.sub(r"^\{(.*)\}", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write arguments and options, without the Python types of the arguments."""
        for title, kind in (("Arguments", "argument"), ("Options", "option")):
            records = [param.get_help_record(ctx) for param in self.get_params(ctx) if param.param_type_name == kind]
            rows = [
                (re.sub(r" <.*>$", "", record[0]), _BOUNDS.sub(_in_words, record[1]))
                for record in records
                if record is not None
            ]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(self.epilog, formatter)


class Commands(TyperGroup):
    """A group of commands, such as `gorgon runs`; their descriptions are never cut."""

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the commands with the first sentence of their help."""
        rows = [(name, summary(command)) for name, command in self.commands.items() if not command.hidden]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def format_epilog(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the examples."""
        _write_examples(self.epilog, formatter)


def summary(command: Any) -> str:
    """Return the first paragraph of a command's help on one line."""
    return " ".join((command.help or "").split("\n\n")[0].split())


class Group(TyperGroup):
    """Turns exceptions of commands into a message and an exit code; shows a traceback only with --debug."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Find out whether --json is given, before anything can fail."""
        ctx.meta[JSON] = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Context) -> Any:
        """Run the command given by the arguments."""
        try:
            return super().invoke(ctx)
        except errors.GorgonError as error:
            if ctx.meta.get(DEBUG):
                raise
            self._end(ctx, error, terminal.EXIT_BAD_INPUT)
        except typer.TyperException as error:
            _emit(ctx, errors.InputInvalid(_sentence(error)))
            raise
        except KeyboardInterrupt:
            _emit(ctx, errors.Cancelled("It was interrupted."))
            raise
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if ctx.meta.get(DEBUG):
                raise
            outside = environment_fault(error)
            if outside is not None:
                self._end(ctx, outside, terminal.EXIT_BAD_INPUT)
            fault = Fault(
                f"This is a bug in Gorgon: {type(error).__name__}: {redact(str(error))}",
                hint="`gorgon --debug …` shows where; please report it.",
            )
            self._end(ctx, fault, terminal.EXIT_BUG)

    @staticmethod
    def _end(ctx: Context, error: errors.GorgonError, code: int) -> NoReturn:
        _emit(ctx, error)
        terminal.tell_error(error)
        raise typer.Exit(code) from None

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        """Write the commands by sections."""
        shown = [(name, command) for name, command in self.commands.items() if not command.hidden]
        width = max(len(name) for name, _ in shown)
        for section in SECTIONS:
            rows = [
                (name.ljust(width), summary(command))
                for name, command in shown
                if getattr(command, "rich_help_panel", None) == section
            ]
            if rows:
                with formatter.section(section):
                    formatter.write_dl(rows)


def _emit(ctx: Context, error: errors.GorgonError) -> None:
    """Print the JSON document of an error, if it was requested and stdout can be written."""
    if ctx.meta.get(JSON):
        with suppress(errors.ConfigurationError, BrokenPipeError):
            terminal.emit(terminal.error_document(error))


def _sentence(error: typer.TyperException) -> str:
    told = getattr(error, "format_message", None)
    return str(told()) if told is not None else str(error)
