"""The two sides of the benchmark: Gorgon and raw Celery, each with its worker processes, on the same two servers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
import redis

from bench import shapes
from bench.meters import Meter, Reading
from gorgon_common import settings
from gorgon_common.canvas.celery import THREADS_PER_SLOT
from gorgon_common.persistence import upgrade
from gorgon_common.workflow.plan import Plan
from tests.support.servers import dying_with_parent, postgres, redis_server
from tests.support.services import Services, build

ROOT = Path(__file__).resolve().parents[1]
WORKERS = 2
SLOTS = 8
RUN_SECONDS = 240.0
POLL_SECONDS = 0.01
SETTLE_SECONDS = 0.05
"""Work that a worker does just after a run has ended (an acknowledgement) belongs to the block."""
BLOCK_STEPS = 1000
"""Small runs are repeated until a block has about this many steps."""
SUCCEEDED, FAILED = 5, 6
_BIN = Path(sys.executable).parent


@dataclass
class Servers:
    """A PostgreSQL with fsync on and a Redis; each side has a separate database on both."""

    gorgon_url: str
    raw_url: str
    redis_url: str
    raw_redis_url: str


@contextlib.contextmanager
def servers() -> Iterator[Servers]:
    """Start both servers."""
    with postgres(fsync=True) as url, redis_server() as redis_url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE gorgon")
            connection.execute("CREATE DATABASE raw")
        ours, theirs = (urlunsplit(urlsplit(url)._replace(path=name)) for name in ("/gorgon", "/raw"))
        upgrade(ours)
        yield Servers(ours, theirs, redis_url, redis_url.removesuffix("/0") + "/1")


class Fleet:
    """Worker processes, which end with this one."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        self._file = log.open("ab")
        self.processes = [
            subprocess.Popen(
                dying_with_parent(list(command)),
                env={**os.environ, **environment},
                cwd=ROOT,
                stdout=self._file,
                stderr=subprocess.STDOUT,
            )
            for command in commands
        ]

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [process.pid for process in self.processes]

    def check(self) -> None:
        """Raise RuntimeError if one has ended."""
        if any(process.poll() is not None for process in self.processes):
            raise RuntimeError(f"a worker has ended:\n{self.log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Stop the workers, gracefully first."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        for process in self.processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._file.close()


@dataclass
class Gorgon:
    """Gorgon's side.  A context manager; `workers` starts them."""

    servers: Servers
    folder: Path
    services: Services = field(init=False)
    connection: psycopg.Connection[Any] = field(init=False)
    name = "gorgon"

    def __post_init__(self) -> None:
        self._environment = {
            "GORGON_DATABASE_URL": self.servers.gorgon_url,
            "GORGON_REDIS_URL": self.servers.redis_url,
            "GORGON_ENV_FILE": "",
            "GORGON_HOME": str(self.folder),
            "GORGON_SANDBOX_URL": "http://127.0.0.1:9",
        }
        self.services = build(
            settings.Settings(database_url=self.servers.gorgon_url, redis_url=self.servers.redis_url, home=self.folder)
        )
        self.connection = psycopg.connect(self.servers.gorgon_url, autocommit=True)

    def close(self) -> None:
        """Close connections."""
        self.connection.close()
        self.services.close()

    @contextlib.contextmanager
    def workers(self, queues: Sequence[Sequence[str]], slots: int = SLOTS) -> Iterator[Fleet]:
        """Start a worker process for each list of queues and yield when all are ready."""
        commands = [
            [str(_BIN / "gorgon"), "worker", *[part for name in names for part in ("-q", name)], "--slots", str(slots)]
            for names in queues
        ]
        fleet = Fleet(commands, self._environment, self.folder / "gorgon.log")
        try:
            until = time.monotonic() + 30
            while len(self.listening()) < len(commands):
                fleet.check()
                if time.monotonic() > until:
                    raise RuntimeError(f"the workers did not start:\n{fleet.log.read_text()[-2000:]}")
                time.sleep(0.05)
            for _ in range(2 * len(commands)):
                self.run(shapes.plan(shapes.fan_out(200), name="warm-up"))
            yield fleet
        finally:
            fleet.stop()

    def listening(self) -> list[str]:
        """Return the clients that wait for messages with BRPOP."""
        with redis.Redis.from_url(self.servers.redis_url) as client:
            return [entry["addr"] for entry in client.client_list() if entry["cmd"] == "brpop" and entry["db"] == "0"]

    def run(self, plan: Plan) -> str:
        """Run a plan to its end; return the run's number.  Raises RuntimeError if it does not succeed."""
        return self.wait(self.services.submit(plan, {}).run_id)

    def wait(self, run_id: str) -> str:
        """Wait for the end of a run.  Raises RuntimeError if it does not succeed."""
        until = time.monotonic() + RUN_SECONDS
        while time.monotonic() < until:
            row = self.connection.execute(
                "SELECT status FROM runs WHERE public_id = %s AND finished_at IS NOT NULL", (run_id,), prepare=True
            ).fetchone()
            if row is not None:
                if self.services.run(run_id)["status"] != "succeeded":
                    raise RuntimeError(f"a run failed: {self.services.run(run_id)['error']}")
                return run_id
            time.sleep(POLL_SECONDS)
        raise RuntimeError(f"a run did not end within {RUN_SECONDS:.0f} s")

    def times(self, run_id: str) -> list[tuple[float, float]]:
        """Return (started, finished) of each queued step in the order in which they started, seconds since 1970."""
        rows = self.connection.execute(
            "SELECT extract(epoch FROM c.started_at)::float8, extract(epoch FROM c.finished_at)::float8"
            " FROM runs r JOIN checkpoints c ON c.step_id >= r.id << 20 AND c.step_id < (r.id + 1) << 20"
            " JOIN ledger l ON l.step_id = c.step_id WHERE r.public_id = %s ORDER BY 1, 2",
            (run_id,),
        ).fetchall()
        return [(started, finished) for started, finished in rows]


@dataclass
class Raw:
    """Raw Celery's side."""

    servers: Servers
    folder: Path

    def __post_init__(self) -> None:
        # raw_celery reads them when it is imported
        os.environ["RAW_DATABASE_URL"] = self.servers.raw_url
        os.environ["RAW_REDIS_URL"] = self.servers.raw_redis_url
        from bench import raw_celery  # noqa: PLC0415

        self.tasks = raw_celery
        with psycopg.connect(self.servers.raw_url, autocommit=True) as connection:
            connection.execute(raw_celery.TABLE)

    @contextlib.contextmanager
    def workers(self, count: int = WORKERS, threads: int = SLOTS * THREADS_PER_SLOT) -> Iterator[Fleet]:
        """Start worker processes and yield when all are ready."""
        command = [str(_BIN / "celery"), "-A", "bench.raw_celery", "worker", "-P", "threads", "-c", str(threads)]
        command += ["--without-gossip", "--without-mingle", "--without-heartbeat", "-l", "warning"]
        commands = [[*command, "-n", f"raw{number}@localhost"] for number in range(count)]
        fleet = Fleet(commands, {}, self.folder / "raw.log")
        try:
            with redis.Redis.from_url(self.servers.raw_redis_url) as client:
                until = time.monotonic() + 30
                while sum(e["cmd"] == "brpop" and e["db"] == "1" for e in client.client_list()) < count:
                    fleet.check()
                    if time.monotonic() > until:
                        raise RuntimeError(f"raw Celery's workers did not start:\n{fleet.log.read_text()[-2000:]}")
                    time.sleep(0.05)
            for _ in range(2 * count):
                self.counters(shapes.fan_out(200))
                self.canvas("map-reduce", 200)
            yield fleet
        finally:
            fleet.stop()

    def close(self) -> None:
        """Discard the results of canvases; Celery would otherwise subscribe to them again after Redis has stopped."""
        self.tasks.app.backend.result_consumer.subscribed_to.clear()

    def counters(self, deps: shapes.Deps) -> None:
        """Run a graph by in-degree counters."""
        self.tasks.wait(self.tasks.send_counters(deps), RUN_SECONDS)

    def canvas(self, shape: str, steps: int) -> None:
        """Run a shape as a canvas."""
        self.tasks.wait(self.tasks.send_canvas(shape, steps), RUN_SECONDS)


def measured(meter: Meter, run: Any, steps: int) -> Reading:
    """Run a block and return its cost per step."""
    times = max(1, round(BLOCK_STEPS / steps))
    before = meter.read()
    wall = 0.0
    for _ in range(times):
        since = time.perf_counter()
        run()
        wall += time.perf_counter() - since
    time.sleep(SETTLE_SECONDS)
    spent = meter.read().since(before, steps * times)
    return Reading(wall * 1000 / (steps * times), *[getattr(spent, name) for name in Reading.__slots__[1:]])
