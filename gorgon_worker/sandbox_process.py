"""A private sandbox: a process next to this one, on a free port, that ends together with it."""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import threading
from types import TracebackType
from typing import Self

from gorgon_common.errors import Unavailable
from gorgon_common.settings import Settings

MODULE = "gorgon_api.sandbox"
"""A separate program; nothing is imported from it."""
_READY = 20.0
_URL = re.compile(r"https?://\S+")


class SandboxProcess:
    """Starts on construction; `url()` waits until it responds.  A context manager that stops it on exit.

    The process checks whether its parent is alive and exits if it is not, so it also ends if this process is killed.
    """

    def __init__(self, settings: Settings) -> None:
        command = [sys.executable, "-m", MODULE, "--host", "127.0.0.1", "--port", "0"]
        command += ["--seed", str(settings.sandbox_seed), "--exit-with-parent", str(os.getpid())]
        if settings.sandbox_latency is not None:
            command += ["--latency", f"{settings.sandbox_latency}s"]
        # A separate session: Ctrl-C in the terminal must not end the sandbox before the run has been cancelled.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._said: list[str] = []
        self._url: str | None = None
        self._readers = [
            threading.Thread(target=read, name="gorgon-sandbox-output", daemon=True)
            for read in (self._read_output, self._read_errors)
        ]
        for thread in self._readers:
            thread.start()

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def url(self) -> str:
        """Return the address once the sandbox responds.  Raises Unavailable if it does not start."""
        while self._url is None:
            try:
                line = self._lines.get(timeout=_READY)
            except queue.Empty:
                line = None
            if line is None:
                for thread in self._readers:
                    thread.join(1)  # its last output may still be in transit
                said = self._said[-1] if self._said else "it printed nothing"
                raise Unavailable(f"The sandbox did not start: {said}", hint="`gorgon sandbox` shows why.")
            found = _URL.search(line)
            self._url = found[0].rstrip("/") if found else None
        return self._url

    def close(self) -> None:
        """Stop the process."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for thread in self._readers:
            thread.join(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def _read_output(self) -> None:
        assert self._process.stdout is not None  # it is a pipe
        with self._process.stdout as output:
            for line in output:
                self._lines.put(line)
        self._lines.put(None)

    def _read_errors(self) -> None:
        assert self._process.stderr is not None  # it is a pipe
        with self._process.stderr as output:
            for line in output:
                self._said = [*self._said[-20:], line.strip()]
