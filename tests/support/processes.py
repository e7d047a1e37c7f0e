"""Worker, API and Redis processes that tests start, stop, freeze and kill."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import redis

from gorgon_common.settings import Settings
from tests.support.running import Lab
from tests.support.sandbox import Sandbox
from tests.support.servers import dying_with_parent, free_port, redis_executable
from tests.support.services import Services, build

GORGON = [sys.executable, "-m", "gorgon_common.cli"]


class Process:
    """A `gorgon …` server process; its stderr is kept for error messages."""

    def __init__(self, *arguments: str, ready: str, environment: Mapping[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GORGON_")}
        self._process = subprocess.Popen(
            [*GORGON, *arguments],
            env={**kept, "GORGON_ENV_FILE": "", **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.said: list[str] = []
        self.line = ""
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, args=(re.compile(ready),), daemon=True)
        self._reader.start()

    def _read(self, ready: re.Pattern[str]) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for line in stream:
                self.said.append(line)
                if not self._ready.is_set() and ready.search(line):
                    self.line = line
                    self._ready.set()
        self._ready.set()

    def wait_ready(self, seconds: float = 60.0) -> None:
        """Wait until it reports that it is ready.  Raises AssertionError with its output if it does not."""
        assert self._ready.wait(seconds), "".join(self.said)
        assert self.line, "".join(self.said)

    @property
    def ready(self) -> bool:
        """Whether it has reported that it is ready."""
        return bool(self.line)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def wait(self, seconds: float = 20.0) -> int:
        """Wait until it ends, and return the exit code.  Raises AssertionError if it does not end."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError("it did not end:\n" + "".join(self.said)) from None
        self._reader.join(5)
        return code

    def kill(self) -> None:
        """Kill it as `kill -9` does."""
        self._process.kill()
        self._process.wait()
        self._reader.join(5)

    def terminate(self, seconds: float = 20.0) -> float:
        """Ask it to end (SIGTERM) and wait; returns the seconds that this took.  Kills it if it does not end."""
        begun = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            self.send(signal.SIGCONT)
            self.send(signal.SIGTERM)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self._reader.join(5)
        return time.monotonic() - begun


class Cluster(Lab):
    """Worker processes on PostgreSQL and Redis, and services in this process to submit and inspect runs."""

    def __init__(self, services: Services, sandbox: Sandbox, environment: Mapping[str, str]) -> None:
        super().__init__(services, sandbox, home="")
        self.environment = dict(environment)
        self.processes: list[Process] = []

    def worker(self, *queues: str, slots: int = 8, wait: bool = True) -> Process:
        """Start a worker process for some queues (all if none is named)."""
        chosen = [part for name in queues for part in ("-q", name)]
        environment = {**self.environment, "GORGON_LOG_LEVEL": "info"}
        process = Process("worker", *chosen, "--slots", str(slots), ready=r"\bready\.?$", environment=environment)
        self.processes.append(process)
        if wait:
            process.wait_ready()
        return process

    def close(self) -> None:
        for process in self.processes:
            if process.alive:
                process.send(signal.SIGCONT)
                process.send(signal.SIGTERM)
        for process in self.processes:
            process.terminate(8)
        self.processes.clear()


@contextlib.contextmanager
def cluster(
    database_url: str, redis_url: str, sandbox: Sandbox, folder: Path, *, lease: float = 30.0
) -> Iterator[Cluster]:
    """Yield a cluster without workers; workers started in it end with the context."""
    environment = {
        "GORGON_DATABASE_URL": database_url,
        "GORGON_REDIS_URL": redis_url,
        "GORGON_SANDBOX_URL": sandbox.url,
        "GORGON_HOME": str(folder),
        "GORGON_LEASE_SECONDS": str(lease),
        "GORGON_COMMANDS_ALLOW": "*",
    }
    settings = Settings(
        _env_file=None,
        home=folder,
        database_url=database_url,
        redis_url=redis_url,
        broker_url=redis_url,
        lease_seconds=lease,
    )
    with contextlib.closing(build(settings)) as services:
        made = Cluster(services, sandbox, environment)
        try:
            yield made
        finally:
            made.close()


class RedisProcess:
    """A Redis that tests stop and restart, empty, on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        argv: Sequence[str] = [
            redis_executable(),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"),
            *("--dir", str(self.folder), "--maxmemory-policy", "noeviction", "--logfile", str(self.folder / "log")),
        ]
        self._process = subprocess.Popen(dying_with_parent(list(argv)), stdin=subprocess.DEVNULL)
        until = time.monotonic() + 10
        with self.client() as client:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    assert time.monotonic() < until, "Redis did not start"
                    time.sleep(0.01)

    def stop(self) -> None:
        """Kill it as `kill -9` does, so that nothing is saved."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def client(self) -> Iterator[redis.Redis]:
        with contextlib.closing(redis.Redis.from_url(self.url)) as client:
            yield client
