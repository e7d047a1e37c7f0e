"""Reads files named by people: a path, a pipe such as `<(command)`, or `-` for standard input."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path
from typing import Final

from gorgon_common.errors import InputInvalid, NotFound

STDIN: Final = "-"


def is_stream(name: str) -> bool:
    """Return whether a name stands for something that can be read only once and not written back: stdin or a pipe."""
    return name == STDIN or (Path(name).exists() and not Path(name).is_file() and not Path(name).is_dir())


def shown_name(name: str) -> str:
    """Return the name of a file for messages."""
    return "<stdin>" if name == STDIN else name


def read_text(name: str, *, limit: int) -> str:
    """Return the text of a file of at most `limit` bytes, without a byte order mark.

    Raises NotFound.  Raises InputInvalid if it is a directory, too large, empty (stdin), not UTF-8 or unreadable.
    """
    shown = shown_name(name)
    data = _stdin(limit) if name == STDIN else _file(Path(name).expanduser(), shown, limit)
    if len(data) > limit:
        raise InputInvalid(f"{shown} is larger than {_size(limit)}, the most that is read.")
    return _decoded(data, shown)


def _file(path: Path, shown: str, limit: int) -> bytes:
    try:
        if path.is_dir():
            raise InputInvalid(f"{shown} is a directory; a file is needed here.")
        with path.open("rb") as file:
            return file.read(limit + 1)
    except FileNotFoundError:
        raise NotFound(f"There is no file {shown}.") from None
    except (OSError, ValueError) as error:
        raise InputInvalid(f"{shown} cannot be read: {getattr(error, 'strerror', None) or error}.") from None


def _stdin(limit: int) -> bytes:
    if sys.stdin is None:
        raise InputInvalid("The standard input is closed, so `-` cannot be read.")
    try:
        data: bytes = sys.stdin.buffer.read(limit + 1)
    except OSError as error:
        raise InputInvalid(f"The standard input cannot be read: {error.strerror}.") from None
    if not data:
        raise InputInvalid(
            "The standard input is empty.", hint="`-` reads what is piped in, and it can be named once in a command."
        )
    return data


def _decoded(data: bytes, shown: str) -> str:
    """Decode UTF-8, or UTF-16 if there is a byte order mark for it (Windows PowerShell writes it)."""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise InputInvalid(f"{shown} is not UTF-8 text (byte {error.start}).", hint="Save the file as UTF-8.") from None


def _size(limit: int) -> str:
    return f"{limit // 1_000_000} MB" if limit % 1_000_000 == 0 else f"{limit // 1024**2} MB"
