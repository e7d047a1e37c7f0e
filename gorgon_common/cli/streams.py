"""Handles the limits of stdout and stderr: encodings without some characters, full disks, readers that have exited."""

from __future__ import annotations

import codecs
import os
import signal
import sys
import threading
import traceback
from types import TracebackType
from typing import Any, NoReturn, TextIO

from gorgon_common import logs
from gorgon_common.cli import terminal
from gorgon_common.masking import redact

_ERRORS = "gorgon"
_PLAIN = {
    "✓": "+",
    "✗": "x",
    "·": "-",
    "◌": "o",
    "⊘": "/",
    "–": "-",
    "—": "-",
    "…": "...",
    "→": "->",
    "←": "<-",
    "│": "|",
    "─": "-",
    "━": "=",
    "├": "+",
    "└": "+",
    "┌": "+",
    "┐": "+",
    "┘": "+",
    "╰": "+",
    "╯": "+",
    "█": "#",
    "×": "x",
    "≤": "<=",
    "≥": ">=",
    "±": "+/-",
    "•": "*",
    "“": '"',
    "”": '"',
    "‘": "'",
    "’": "'",
    **dict.fromkeys("⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏", "*"),
    "\u00a0": " ",
}
"""Replacements for Gorgon's own symbols if the encoding lacks them; other characters become escapes."""


def prepare() -> None:
    """Configure the standard streams and tracebacks.

    The streams write every character as well as their encoding can, and every line at once, also into a pipe: `gorgon
    run f.yaml | tee log` shows the progress of the run.  Tracebacks mask secrets.
    """
    codecs.register_error(_ERRORS, _replace)
    sys.stdout = sys.stdout or _nowhere()  # closed by the parent process
    sys.stderr = sys.stderr or _nowhere()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors=_ERRORS, line_buffering=True)
    logs.guard()
    sys.excepthook = _tell
    # SIGTERM ends a command as Ctrl-C does.  Shells start background jobs with SIGINT ignored; this handler enables it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.excepthook = _tell_of_thread


def finish(code: Any) -> NoReturn:
    """End the process, with code 2 if the output could not be written."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up_stdout()
        code = code or terminal.EXIT_RUN_FAILED
    except OSError as error:
        _give_up_stdout()
        terminal.note(f"Error: The output cannot be written: {error.strerror}.")
        code = terminal.EXIT_BAD_INPUT
    sys.exit(code)


def _give_up_stdout() -> None:
    """Discard unwritten output, because the interpreter flushes stdout once more at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    parts = (_PLAIN.get(sign) or _escaped(sign) for sign in error.object[error.start : error.end])
    return "".join(parts), error.end


def _escaped(sign: str) -> str:
    return sign.encode("ascii", "backslashreplace").decode("ascii")


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    terminal.note(redact("".join(traceback.format_exception(kind, error, trace))).rstrip())


def _tell_of_thread(happened: threading.ExceptHookArgs) -> None:
    if happened.exc_value is not None and happened.exc_type is not SystemExit:
        _tell(happened.exc_type, happened.exc_value, happened.exc_traceback)
