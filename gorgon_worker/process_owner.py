"""The home of an embedded run: identifies the owning process, so that others can tell whether it is still alive.

A home is `host:pid:start:random`; `start` is the process's start time, because the kernel reuses pids.
"""

from __future__ import annotations

import os
import secrets
import socket
from pathlib import Path

_HOST = 40


def new_home() -> str:
    """Return a new home name for this process."""
    pid = os.getpid()
    return f"{_host()}:{pid}:{_started(pid)}:{secrets.token_hex(4)}"


def is_deserted(home: str) -> bool:
    """Tell whether the home's process is known to be dead; False if that cannot be determined (another machine)."""
    host, _, rest = home.partition(":")
    parts = rest.split(":")
    if host != _host() or len(parts) != 3 or not parts[0].isdecimal():
        return False
    pid = int(parts[0])
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(pid) != parts[1]


def _host() -> str:
    return socket.gethostname().replace(":", "-")[:_HOST]


def _started(pid: int) -> str:
    """Return a process's start time in clock ticks since boot, `0` if the system does not provide it (proc(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return "0"
