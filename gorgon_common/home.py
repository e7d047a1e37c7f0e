"""Gorgon's folder, created if it is missing, and readable only by its owner."""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from gorgon_common.errors import ConfigurationError

_FOLDER, _FILE = 0o700, 0o600
_NAME = "gorgon"


def make_folder(path: Path, what: str, mode: int = 0o777) -> None:
    """Create a folder and its parents.  Raises ConfigurationError, which names the failed folder and the reason."""
    try:
        if path.is_dir():
            return
        path.mkdir(mode=mode, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        blocked = next((folder for folder in (path, *path.parents) if _is_other(folder)), None)
        if blocked is not None:
            reason = f"{blocked} is a file"
        raise ConfigurationError(
            f"The folder {path} for {what} cannot be made: {reason}.",
            hint="Set GORGON_HOME to a directory that this user can write, for example GORGON_HOME=/tmp/gorgon.",
        ) from None


def protect(home: Path, *, make: bool) -> None:
    """Remove other users' permissions from Gorgon's folder and the files in it (0700, 0600).

    `make`: create the folder if it is missing.  In a folder that holds other things too, only Gorgon's own files are
    changed, because GORGON_HOME may be set to /tmp.  Files of other users, and file systems without permissions, are
    left as they are.  Raises ConfigurationError.
    """
    if make:
        make_folder(home, "Gorgon's files", _FOLDER)
    with contextlib.suppress(OSError), os.scandir(home) as found:
        entries = list(found)
        ours = home.name.lstrip(".") == _NAME or all(entry.name.startswith(_NAME) for entry in entries)
        if ours:
            _restrict(home, _FOLDER)
        for entry in entries:
            if entry.is_file(follow_symlinks=False) and (ours or entry.name.startswith(f"{_NAME}.db")):
                _restrict(Path(entry.path), _FILE)


def _restrict(path: Path, most: int) -> None:
    with contextlib.suppress(OSError):  # another process may have removed it (SQLite's -wal)
        found = path.stat()
        mode = stat.S_IMODE(found.st_mode)
        if mode & ~most and found.st_uid == os.geteuid():
            path.chmod(mode & most)


def _is_other(path: Path) -> bool:
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False
