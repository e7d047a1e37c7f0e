"""Runs one command and leaves none of its processes behind.  Runs as a separate script; imports only the standard
library.

    python -I -S supervise.py STATUS_FD PARENT_PID LIMITS PROGRAM ARGV0 [ARG…]

It is a separate process for two reasons.  Limits must be set between fork and exec, which a process with threads cannot
do safely.  And only a subreaper (prctl(2), PR_SET_CHILD_SUBREAPER) inherits grandchildren that left the process group.
Every descendant is killed when the command ends, on SIGTERM, and when the worker dies.  Limits: `name=number,…` with
the names of the `resource` module.  One line is written to STATUS_FD: `exit N`, `signal N` or `exec ERRNO`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import time
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only; other systems rely on the process group
    if prctl is not None:
        prctl(option, value)


def _children() -> list[int]:
    """Return the live and dead children of this process, including adopted ones."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as listing:
            return [int(pid) for pid in listing.read().split()]
    except OSError:
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _parent(pid) == os.getpid()]


def _parent(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return int(stat.read().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def _kill_children() -> None:
    for pid in _children():
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _kill_rest() -> None:
    """Kill every descendant.  Killing a process makes its children ours, so the loop ends when none are left."""
    while True:
        _kill_children()
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            time.sleep(0.001)


def _limit(limits: str) -> None:
    for entry in filter(None, limits.split(",")):
        name, _, number = entry.partition("=")
        which = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(which)[1]
        wanted = int(number)
        if name == "NPROC":
            wanted += _tasks()
        ceiling = wanted + 1 if name == "CPU" else wanted  # SIGXCPU, then SIGKILL a second later
        if hard != resource.RLIM_INFINITY:
            wanted, ceiling = min(wanted, hard), min(ceiling, hard)
        resource.setrlimit(which, (wanted, ceiling))


def _tasks() -> int:
    """Return the number of this user's threads, because the kernel's limit counts them all.  Root has no such limit."""
    user, found = os.getuid(), 0
    if user == 0:
        return 0
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.stat(f"/proc/{pid}").st_uid == user:
                found += len(os.listdir(f"/proc/{pid}/task"))
        except OSError:
            continue
    return found


def _execute(status_fd: int, limits: str, program: str, argv: list[str]) -> NoReturn:
    """Replace the forked child with the command."""
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)  # the interpreter ignores some, and the command would inherit that
        _limit(limits)
        os.execv(program, argv)
    except OSError as error:
        os.write(status_fd, f"exec {error.errno}\n".encode())
    finally:
        os._exit(127)


def main(status_fd: int, parent: int, limits: str, program: str, argv: list[str]) -> None:
    """Run the command; see the module."""
    stopped = False

    def stop(_number: int, _frame: object) -> None:
        nonlocal stopped
        stopped = True
        _kill_children()  # includes the command, so that the wait below ends

    os.set_inheritable(status_fd, False)
    signal.signal(signal.SIGTERM, stop)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # the parent died before prctl
        return
    command = os.fork()
    if command == 0:
        _execute(status_fd, limits, program, argv)
    if stopped:  # the signal came before there was anything to kill
        _kill_children()
    pid = 0
    while pid != command:
        pid, status = os.waitpid(-1, 0)
    _kill_rest()
    code = os.waitstatus_to_exitcode(status)
    os.write(status_fd, (f"exit {code}\n" if code >= 0 else f"signal {-code}\n").encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
