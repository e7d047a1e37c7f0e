"""Output of commands, and exit codes.

All output passes through `safe` (or `emit`, for JSON), which masks secrets and makes control characters visible.
stdout carries the answer, stderr everything else.  With `--json`, stdout is exactly one document, even if the command
fails.  rich is imported when something is drawn for the first time.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TextIO

from gorgon_common import errors, lazy, strict_json
from gorgon_common.masking import SECRETS
from gorgon_common.printable import json_safe, visible

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

EXIT_OK: Final = 0
EXIT_RUN_FAILED: Final = 1
EXIT_BAD_INPUT: Final = 2
EXIT_WAITING: Final = 3
"""Waiting for a person, or left running."""
EXIT_BUG: Final = 70
EXIT_INTERRUPTED: Final = 130

_NO_WIDTH: Final = 100_000

_THEME = {
    "ok": "green",
    "bad": "red",
    "busy": "cyan",
    "wait": "yellow",
    "off": "bright_black",
    "quiet": "bright_black",
    "name": "bold",
    "hint": "cyan",
}


def console(stream: TextIO | None = None, *, force_terminal: bool | None = None) -> Console:
    """Return a rich console on stdout (or on `stream`); colours depend on the terminal, NO_COLOR and FORCE_COLOR.

    Output that is not a terminal has no width: nothing is wrapped, shortened or left out.
    """
    theme = lazy.load("rich.theme:Theme")(_THEME)
    file = stream or sys.stdout
    made: Console = lazy.load("gorgon_common.cli.safe_console:SafeConsole")(
        safe,
        file=file,
        theme=theme,
        highlight=False,
        markup=False,
        emoji=False,
        force_terminal=force_terminal,
        width=None if force_terminal or file.isatty() else _NO_WIDTH,
    )
    return made


def safe(text: str) -> str:
    """Return text that is safe to print: secrets are masked, foreign control characters and escapes are made visible.

    Every text for a terminal or a pipe passes through here once, before layout.
    """
    return visible(SECRETS.mask(text))


def interactive() -> bool:
    """Return whether stdout is a terminal that can be drawn on."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(text: str = "") -> None:
    """Print a line of the answer."""
    _write(safe(text))


def _write(text: str) -> None:
    with writing():
        print(text)


@contextmanager
def writing() -> Iterator[None]:
    """Report a failed write to stdout like that of any other file.  Raises ConfigurationError."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise errors.ConfigurationError(
            f"The output cannot be written: {error.strerror}.",
            hint="See where stdout leads, and whether there is room.",
        ) from None


def note(text: str) -> None:
    """Print a line on stderr, beside the answer."""
    print(safe(text), file=sys.stderr, flush=True)


def reveal(text: str) -> None:
    """Print a secret on stderr, once, for the person who needs it."""
    print(visible(text), file=sys.stderr, flush=True)


def whisper(text: str) -> None:
    """Print a line beside the answer that most users already know."""
    console(sys.stderr).print(text, style="quiet", soft_wrap=True)


def emit(document: Any) -> None:
    """Print the one JSON document of `--json`: exact, with secrets masked and control characters as JSON escapes."""
    _write(_json(document, indent=2))


def emit_line(document: Any) -> None:
    """Print one of several documents, on a separate line."""
    _write(_json(document, indent=None))


def _json(document: Any, *, indent: int | None) -> str:
    text = strict_json.dumps(document, indent=indent, default=str)
    if SECRETS.found(text) is not None:
        text = json.dumps(SECRETS.mask_value(json.loads(text)), indent=indent, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), indent=indent)
    return json_safe(text)


def styled(text: str, style: str) -> Any:
    """Return a text in a style, for a cell of a table."""
    return lazy.load("rich.text:Text")(safe(text), style=style)


def paragraph(text: str, *, indent: int = 0, style: str = "", stream: TextIO | None = None) -> None:
    """Print a text on stdout (or on `stream`): wrapped within its indent on a terminal, on one line in a pipe."""
    file = stream or sys.stdout
    if not file.isatty():
        (note if file is sys.stderr else say)(" " * indent + text)
        return
    body = lazy.load("rich.text:Text")(safe(text) or " ", style=style)
    with writing():
        console(file).print(lazy.load("rich.padding:Padding").indent(body, indent))


def draw(drawing: RenderableType) -> None:
    """Print a rich renderable on stdout; in a pipe nothing is wrapped.  Lines that must not be wrapped are not cut."""
    with writing():
        console().print(drawing, soft_wrap=not interactive(), crop=False)


def tell_error(error: errors.GorgonError) -> None:
    """Print what is wrong and what to do, on stderr."""
    if isinstance(error, errors.WorkflowInvalid):
        tell_problems(error.problems, stream=sys.stderr, source=error.source)
        count = sum(problem.severity == "error" for problem in error.problems)
        note(f"\n{counted(count, 'problem')}. Nothing was started.")
        return
    text = lazy.load("rich.text:Text")
    screen = console(sys.stderr)
    screen.print(text.assemble(("Error: ", "bold red"), error.message), soft_wrap=True)
    if error.hint:
        screen.print(text(error.hint, style="hint"), soft_wrap=True)


def tell_problems(problems: Sequence[errors.Problem], *, stream: TextIO, source: str | None = None) -> None:
    """Print problems with the lines that they are about, as a compiler does.

    `source` is the text in which they were found.  A file is never read again: it may have changed, or be a pipe.
    """
    text = lazy.load("rich.text:Text")
    screen = console(stream)
    for problem in problems:
        bad = problem.severity == "error"
        where = ":".join(str(part) for part in (problem.file, problem.line, problem.column) if part is not None)
        line = text()
        if where:
            line.append(where, style="name").append(": ")
        line.append(problem.severity, style="bad" if bad else "wait").append(f": {problem.message}")
        screen.print(line, soft_wrap=not stream.isatty())
        shown = _line_of(problem, source)
        if shown is not None and problem.line is not None:
            number = f"{problem.line:>5} "
            shown, column = _window(shown, problem.column, screen.width - len(number) - 2)
            screen.print(text.assemble((f"{number}│ ", "quiet"), shown), soft_wrap=True)
            if column is not None and column <= len(shown) + 1:
                word = re.match(r"\W?\w*", shown[column - 1 :])
                mark = " " * (column - 1) + "^" * max(1, len(word[0]) if word else 1)
                under = text.assemble((" " * len(number) + "│ ", "quiet"), (mark, "bad" if bad else "wait"))
                screen.print(under, soft_wrap=True)
        if problem.hint:
            paragraph(problem.hint, indent=6, style="hint", stream=stream)


def _window(line: str, column: int | None, width: int) -> tuple[str, int | None]:
    """Return the part of a line around a column that fits into a width, and the column's position in it."""
    if len(line) <= width or width < 20:
        return line, column
    begin = max(0, min((column or 1) - 1 - width // 2, len(line) - width))
    part = line[begin : begin + width]
    if begin:
        part = "…" + part[1:]
    if begin + width < len(line):
        part = part[:-1] + "…"
    return part, None if column is None else column - begin


def _line_of(problem: errors.Problem, source: str | None) -> str | None:
    if problem.line is None:
        return None
    lines = (source or "").split("\n")
    return lines[problem.line - 1].rstrip("\r").replace("\t", " ") if 0 < problem.line <= len(lines) else None


def error_document(error: errors.GorgonError) -> dict[str, Any]:
    """Return what `--json` prints for an error: `{error: {kind, message, hint, problems?}}`."""
    body: dict[str, Any] = {"kind": type(error).__name__, "message": error.message, "hint": error.hint}
    if isinstance(error, errors.WorkflowInvalid):
        body["message"] = "The workflow file is not valid."
        body["problems"] = [problem.to_dict() for problem in error.problems]
    return {"error": body}


def money(usd: float | None) -> str:
    """Return dollars for people: `$0.0123`, `$4.20`, `–` if there is no price."""
    if usd is None:
        return "–"
    if usd == 0:
        return "$0"
    if usd < 0.0001:
        return "<$0.0001"
    return f"${usd:,.2f}" if usd >= 1 else f"${usd:.4f}"


def cost(document: Mapping[str, Any], *, short: bool = False) -> str:
    """Return the cost of a run, a step or a row of a report: `$0.12 + 3 calls of unknown cost`.

    `short` is for a cell of a table: `$0.12 + ?`, `unknown`.
    """
    unknown = int(document.get("unpriced_calls") or 0)
    if not unknown:
        return money(document.get("cost_usd"))
    known = document.get("known_cost_usd")
    if short:
        return f"{money(known)} + ?" if known else "unknown"
    calls = f"{number(unknown)} {'call' if unknown == 1 else 'calls'} of unknown cost"
    return f"{money(known)} + {calls}" if known else calls


def has_cost(document: Mapping[str, Any]) -> bool:
    """Return whether anything was spent, even if the amount is unknown."""
    return bool(document.get("cost_usd") or document.get("unpriced_calls"))


def seconds(value: float) -> str:
    """Return a duration for people: `85 ms`, `3.2 s`, `4m 05s`, `1h 02m`."""
    if value < 0.995:
        return f"{value * 1000:.0f} ms"
    if value < 99.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def number(count: int) -> str:
    """Return a count with separators: `12,345`."""
    return f"{count:,}"


def counted(count: int, noun: str, many: str = "") -> str:
    """Return a count with its noun: `1 call`, `1,200 calls`; `many`: an irregular plural."""
    return f"{number(count)} {noun if count == 1 else many or noun + 's'}"


def tokens_of(document: Mapping[str, Any]) -> int:
    """Return the tokens, in and out, of a run or a step."""
    used = document.get("tokens") or {}
    return int(used.get("input") or 0) + int(used.get("output") or 0)
