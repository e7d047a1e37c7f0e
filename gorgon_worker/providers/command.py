"""Runs commands that the operator allows: without a shell, in a clean environment, within limits, without leftovers.

`supervise.py` runs the process.  This module decides whether it may run, writes its input, and watches the time, the
amount of output and the cancel flag.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from gorgon_common.engine.ports import CommandCall, CommandResult
from gorgon_common.errors import Cancelled, CommandFailed, OutputTooLarge, Retryable
from gorgon_common.masking import redact
from gorgon_common.workflow.environment import refused_value, refused_variable

_SUPERVISOR = Path(__file__).parents[1] / "supervise.py"
_TICK = 0.05  # seconds between two checks of the cancel flag
_GRACE = 5.0  # seconds for the supervisor to kill everything; it needs milliseconds
_CHUNK = 65536
_FILE_BYTES = 4 * 1024**3
_PROCESSES = 512
_LANG = "C.UTF-8"


class LocalCommands:
    """The CommandRunner of this machine.  Thread-safe.

    `allow`: names or paths of executables, `*` for all, empty for none.  A name allows the file that it resolves to on
    `path` (default: this process's PATH), under that name or by its full path, and no other file of that name.
    """

    def __init__(
        self,
        allow: Iterable[str],
        *,
        path: str | None = None,
        file_bytes: int = _FILE_BYTES,
        processes: int = _PROCESSES,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._allow = tuple(allow)
        entries = (os.environ.get("PATH", os.defpath) if path is None else path).split(os.pathsep)
        # a relative entry would refer to the step's own folder, which the step itself can write
        self._path = os.pathsep.join(entry for entry in entries if os.path.isabs(entry))
        self._file_bytes = file_bytes
        self._processes = processes
        self._monotonic = monotonic

    def program(self, name: str, cwd: str | None = None) -> str:
        """Return the path of the executable `name`.  Raises CommandFailed where it may not run, or does not exist."""
        if not self._allow:
            raise CommandFailed(
                f"Commands are off, so {name!r} cannot run.",
                hint=f"Set GORGON_COMMANDS_ALLOW={name} where the worker runs (a list separated by commas, * for all).",
            )
        found = self._resolve(name, cwd)
        if "*" not in self._allow and (found is None or found not in {self._resolve(entry) for entry in self._allow}):
            allowed = ",".join(self._allow)
            if found is None and name in self._allow:
                raise self._missing(name)
            raise CommandFailed(
                f"{name!r} is not among the commands that this worker may run ({allowed}).",
                hint=f"To allow it, set GORGON_COMMANDS_ALLOW={allowed},{name} where the worker runs.",
            )
        if found is None:
            raise self._missing(name)
        return found

    def _missing(self, name: str) -> CommandFailed:
        return CommandFailed(
            f"There is no program {name!r} on this worker.",
            hint=f"Install it, or add its folder to PATH ({self._path}).",
        )

    def _resolve(self, name: str, cwd: str | None = None) -> str | None:
        """Return the absolute path of a program; symbolic links are followed in its folder, not in its own name.

        (The name of a link may matter: with busybox every command is a link to the same file.)
        """
        if os.sep in name:
            path = os.path.join(cwd or os.getcwd(), name)
            found = path if os.path.isfile(path) and os.access(path, os.X_OK) else None
        else:
            found = shutil.which(name, path=self._path) if self._path and name else None
        return found and os.path.join(os.path.realpath(os.path.dirname(found)), os.path.basename(found))

    def run(self, call: CommandCall, cancelled: Callable[[], bool]) -> CommandResult:
        """Run a command to its end, or kill it and all its descendants.

        HOME and TMPDIR are a folder of its own that is removed afterwards; it works there too, unless `cwd` is given.
        A signal gives the exit code 128 + its number, as in a shell.  Raises CommandFailed where it may not or cannot
        run or breaks a limit, Retryable (kind `timeout`), Cancelled, OutputTooLarge.
        """
        argv = ("sh", "-c", call.shell) if call.shell is not None else call.argv
        if not argv:
            raise CommandFailed("The command is empty.")
        _check_values(argv, call)
        with _scratch() as scratch:
            cwd = os.path.abspath(call.cwd) if call.cwd is not None else scratch
            if not os.path.isdir(cwd):
                raise CommandFailed(f"The working directory {call.cwd!r} does not exist on this worker.")
            program = self.program(argv[0], cwd)
            env = {"PATH": self._path, "LANG": _LANG, **call.env, "HOME": scratch, "TMPDIR": scratch}
            try:
                return self._supervise(program, argv, call, cwd, env, cancelled)
            finally:
                _make_removable(scratch)

    def _limits(self, call: CommandCall) -> str:
        cpu = call.cpu_seconds or int(call.timeout * (os.cpu_count() or 1)) + 1
        # DATA, not AS: runtimes such as V8 reserve far more address space than they ever use
        limits = {
            "CPU": cpu,
            "DATA": call.memory_bytes,
            "FSIZE": self._file_bytes,
            "NPROC": self._processes,
            "CORE": 0,
        }
        return ",".join(f"{name}={number}" for name, number in limits.items())

    def _supervise(
        self,
        program: str,
        argv: tuple[str, ...],
        call: CommandCall,
        cwd: str,
        env: dict[str, str],
        cancelled: Callable[[], bool],
    ) -> CommandResult:
        deadline = self._monotonic() + call.timeout
        status_read, status_write = os.pipe()
        with open(status_read, "rb") as status:
            try:
                shim = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(status_write), str(os.getpid())]
                process = subprocess.Popen(
                    [*shim, self._limits(call), program, *(part.encode() for part in argv)],
                    stdin=subprocess.PIPE if call.stdin else subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    cwd=cwd,
                    env={name.encode(): value.encode() for name, value in env.items()},
                    pass_fds=[status_write],
                    start_new_session=True,
                )
            except OSError as error:
                raise CommandFailed(
                    f"{argv[0]!r} could not be started: {error.strerror}.",
                    hint="Pass large values through `stdin:`; arguments and environment together are limited.",
                ) from error
            finally:
                os.close(status_write)
            with _reaped(process):
                stdout, stderr = self._exchange(process, call, deadline, cancelled)
                self._await(process, call, deadline, cancelled)
            return _result(argv[0], status.read().decode(), call, stdout, stderr)

    def _exchange(
        self, process: subprocess.Popen[bytes], call: CommandCall, deadline: float, cancelled: Callable[[], bool]
    ) -> tuple[bytes, bytes]:
        """Feed stdin and collect stdout and stderr until both are closed, or nobody is left who ought to write."""
        assert process.stdout is not None
        assert process.stderr is not None
        collected = {process.stdout: bytearray(), process.stderr: bytearray()}
        pending = memoryview(call.stdin.encode(errors="replace"))
        with selectors.DefaultSelector() as selector:
            for stream in collected:
                os.set_blocking(stream.fileno(), False)
                selector.register(stream, selectors.EVENT_READ)
            if process.stdin is not None:
                os.set_blocking(process.stdin.fileno(), False)
                selector.register(process.stdin, selectors.EVENT_WRITE)
            while any(stream in selector.get_map() for stream in collected):
                ended = process.poll() is not None
                ready = selector.select(0 if ended else _TICK)
                if ended and not ready:  # held open by a process that escaped a killed supervisor
                    break
                for key, _ in ready:
                    if key.fileobj is process.stdin:
                        pending = _feed(selector, process.stdin, pending)
                    else:
                        _take(selector, key.fileobj, collected[key.fileobj])  # type: ignore[arg-type, index]
                if sum(map(len, collected.values())) > call.output_bytes:
                    raise OutputTooLarge(
                        f"The command wrote more than {_size(call.output_bytes)} and was killed.",
                        hint="Write less, or write to a file and print what the next step needs.",
                    )
                self._look(call, deadline, cancelled, collected[process.stderr])
        return bytes(collected[process.stdout]), bytes(collected[process.stderr])

    def _await(
        self, process: subprocess.Popen[bytes], call: CommandCall, deadline: float, cancelled: Callable[[], bool]
    ) -> None:
        """Wait for the end of a command that closed its output."""
        while True:
            try:
                process.wait(_TICK)
                return
            except subprocess.TimeoutExpired:
                self._look(call, deadline, cancelled)

    def _look(
        self, call: CommandCall, deadline: float, cancelled: Callable[[], bool], stderr: bytes | bytearray = b""
    ) -> None:
        if cancelled():
            raise Cancelled
        if self._monotonic() > deadline:
            raise Retryable(
                f"The command took longer than {call.timeout:g} s and was killed.",
                hint=f"Raise the step's `timeout:`.{_tail(stderr)}",
                kind="timeout",
            )


@contextlib.contextmanager
def _scratch() -> Iterator[str]:
    """Give a folder that is removed afterwards.  Raises CommandFailed where none can be made."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="gorgon-", ignore_cleanup_errors=True)
    except OSError as error:
        raise CommandFailed(
            f"The command's temporary folder cannot be made: {error.strerror}.",
            hint=f"Set TMPDIR to a folder that the worker can write ({tempfile.tempdir or 'now there is none'}).",
        ) from None
    with folder as path:
        yield path


def _check_values(argv: tuple[str, ...], call: CommandCall) -> None:
    reasons = [refused_value(f"argument {index}", part) for index, part in enumerate(argv)]
    for name, value in call.env.items():
        reasons += [refused_variable(name), refused_value(name, value)]
    for reason in filter(None, reasons):
        raise CommandFailed(reason, hint="Pass large values through `stdin:`; choose another name for the variable.")


def _feed(selector: selectors.BaseSelector, stdin: IO[bytes], pending: memoryview) -> memoryview:
    try:
        pending = pending[os.write(stdin.fileno(), pending[:_CHUNK]) :]
    except BrokenPipeError:  # it reads no more input, which is its own decision
        pending = pending[:0]
    if not pending:
        selector.unregister(stdin)
        stdin.close()
    return pending


def _take(selector: selectors.BaseSelector, stream: IO[bytes], into: bytearray) -> None:
    chunk = os.read(stream.fileno(), _CHUNK)
    into += chunk
    if not chunk:
        selector.unregister(stream)


@contextlib.contextmanager
def _reaped(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Kill all remaining processes in any case, and close the pipes."""
    try:
        yield
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)  # the supervisor kills every descendant
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_GRACE)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # should the command have killed its supervisor
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _result(name: str, status: str, call: CommandCall, stdout: bytes, stderr: bytes) -> CommandResult:
    word, _, number = status.partition("\n")[0].partition(" ")
    if word == "exec":
        raise CommandFailed(f"{name!r} could not be started: {os.strerror(int(number))}.")
    if word == "signal" and int(number) == signal.SIGXCPU:
        raise CommandFailed(
            "The command used more CPU time than it is allowed.", hint=f"Raise its limit.{_tail(stderr)}"
        )
    if word == "signal" and int(number) == signal.SIGXFSZ:
        raise CommandFailed(f"The command wrote a file that is larger than allowed.{_tail(stderr)}")
    if word not in {"exit", "signal"}:
        raise CommandFailed(f"The command killed the process that watches it.{_tail(stderr)}")
    code = int(number) if word == "exit" else 128 + int(number)
    return CommandResult(exit_code=code, stdout=_decode(stdout), stderr=_decode(stderr))


def _decode(data: bytes | bytearray) -> str:
    """Read UTF-8, secrets masked; what is not UTF-8, and zero bytes (no database stores them), become U+FFFD."""
    return redact(data.decode(errors="replace").replace("\0", "\ufffd"))


def _tail(stderr: bytes | bytearray) -> str:
    last = _decode(stderr).strip()[-500:]
    return f"\nThe end of its output:\n{last}" if last else ""


def _size(number: int) -> str:
    return f"{number / 1024**2:g} MB" if number >= 1024**2 else f"{number:,} bytes"


def _make_removable(folder: str) -> None:
    """Undo permissions that would keep the folder from being removed."""
    for top, folders, _ in os.walk(folder):
        for name in folders:
            path = os.path.join(top, name)
            if not os.path.islink(path):
                with contextlib.suppress(OSError):
                    os.chmod(path, 0o700)
