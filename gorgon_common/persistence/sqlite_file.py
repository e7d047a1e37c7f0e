"""The file of a SQLite database: where it is, who may read it, and what to do if it cannot be used."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

from gorgon_common.errors import ConfigurationError, GorgonError, StorageFault
from gorgon_common.home import make_folder

PRIVATE = 0o600
_ELSEWHERE = "Free some space there, or set GORGON_HOME (or GORGON_DATABASE_URL) to another disk."
_FAULTS: dict[int, tuple[str, str]] = {
    sqlite3.SQLITE_NOTADB: (
        "is not a SQLite database, or is damaged",
        "Move it away and start again, restore a backup, or set GORGON_DATABASE_URL to another file.",
    ),
    sqlite3.SQLITE_CORRUPT: (
        "is damaged",
        "`sqlite3 FILE .recover` may save what is in it. Move it away and start again, or restore a backup.",
    ),
    sqlite3.SQLITE_FULL: ("cannot grow: its disk is full", _ELSEWHERE),
    sqlite3.SQLITE_READONLY: (
        "cannot be written: the file, its folder or its disk is read-only",
        "Make them writable for this user, or set GORGON_HOME (or GORGON_DATABASE_URL) to a place that is.",
    ),
    sqlite3.SQLITE_CANTOPEN: (
        "cannot be opened",
        "See that its folder exists, belongs to this user and is writable, and that it is a file; or set GORGON_HOME.",
    ),
    sqlite3.SQLITE_PERM: ("may not be accessed", "See that it belongs to this user, or set GORGON_HOME."),
    sqlite3.SQLITE_IOERR: (
        "cannot be read or written: the disk reports an error, or is full",
        "Check the disk and its free space, or set GORGON_HOME (or GORGON_DATABASE_URL) to another one.",
    ),
}
"""SQLite's primary result code → what is wrong with the file, and what to do."""


def prepare(path: str) -> None:
    """Create the folder and the file if they are missing; only the owner may read the file.

    An existing file keeps its permissions; `home.protect` handles those in Gorgon's home.  Raises ConfigurationError.
    """
    file = Path(path)
    make_folder(file.parent, "the database")
    if file.is_dir():
        raise ConfigurationError(
            f"The database {file} is a folder.", hint="Name a file in GORGON_DATABASE_URL, or set GORGON_HOME."
        )
    if file.exists():
        # Opening and closing it here would release the locks of this process's other connections to it (POSIX), and
        # another process could then delete the write-ahead log that they are using.
        return
    # SQLite gives the files beside it (-wal, -shm) the permissions of this one.
    with contextlib.suppress(OSError):  # whatever it is, SQLite reports it when it opens the file
        os.close(os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, PRIVATE))


def fault(error: BaseException, path: str | None) -> GorgonError | None:
    """Return the error to show for an error of SQLite; None if it is not about the file."""
    code = getattr(getattr(error, "orig", error), "sqlite_errorcode", None)
    if code == sqlite3.SQLITE_CANTOPEN and path and _cannot_write(Path(path).parent):
        code = sqlite3.SQLITE_READONLY
    known = _FAULTS.get(code & 0xFF) if code is not None else None
    if known is None:
        return None
    what, hint = known
    # A damaged file stays damaged; space and permissions may come back while a worker waits.
    damaged = code is not None and code & 0xFF in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)
    return (ConfigurationError if damaged else StorageFault)(f"The database {path or ''} {what}.", hint=hint)


def _cannot_write(folder: Path) -> bool:
    return folder.is_dir() and not os.access(folder, os.W_OK)
