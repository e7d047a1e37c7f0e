"""The cost of a stretch of work: CPU of processes, transactions and bytes of PostgreSQL, traffic of Redis."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import psycopg
import redis

_TICK = os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    """Return a process's own CPU time over all its threads, to the nanosecond if the kernel provides it."""
    try:
        return time.clock_gettime(~pid << 3 | 2)  # its CPU clock: clock_getcpuclockid(3)
    except OSError:
        return sum(map(int, _stat(pid)[11:13])) / _TICK


def _stat(pid: int) -> list[str]:
    return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()


def cpu_seconds(trees: Iterable[int], alone: Iterable[int] = ()) -> float:
    """Return the CPU time of process trees (ended children included) and of single processes, each counted once."""
    children: dict[int, list[int]] = {}
    ended: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found = _stat(int(entry.name))
            except OSError:
                continue
            children.setdefault(int(found[1]), []).append(int(entry.name))
            ended[int(entry.name)] = sum(map(int, found[13:15])) / _TICK
    members: set[int] = set()
    to_visit = list(trees)
    while to_visit:
        pid = to_visit.pop()
        if pid not in members:
            members.add(pid)
            to_visit += children.get(pid, [])
    total = sum(ended.get(pid, 0.0) for pid in members)
    for pid in members | set(alone):
        try:
            total += process_seconds(pid)
        except OSError:
            continue  # it has ended, and its time is in its parent's sum
    return total


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment, or the difference of two."""

    wall: float
    cpu: float
    commits: float
    """Transactions that wrote something: each is a flush of the WAL."""
    wal_bytes: float
    messages: float
    """Messages pushed to queues."""
    commands: float
    """Commands that Redis has processed, including those within pipelines and scripts."""
    redis_bytes: float
    """Bytes into and out of Redis."""

    def since(self, before: Reading, steps: int) -> Reading:
        """Return what was added since then, per step for `steps` steps; times in milliseconds."""
        per = {
            entry.name: (getattr(self, entry.name) - getattr(before, entry.name)) / steps for entry in fields(Reading)
        }
        per["wall"] *= 1000
        per["cpu"] *= 1000
        return Reading(**per)


class Meter:
    """Reads all counters.

    `trees`: processes that are counted with their children; `alone`: without.  PostgreSQL's and Redis's own processes
    are added if they run on this machine and are accessible.
    """

    def __init__(self, postgres_url: str, redis_url: str, trees: Iterable[int] = (), alone: Iterable[int] = ()) -> None:
        self.connection = psycopg.connect(postgres_url, autocommit=True)
        self.redis = redis.Redis.from_url(redis_url)
        self.trees = [*trees, *self._servers()]
        self.alone = list(alone)
        self.read()

    def _servers(self) -> list[int]:
        folder = self.connection.execute("SHOW data_directory").fetchone()
        assert folder is not None
        found = [int(self.redis.info("server")["process_id"])]
        lock = Path(folder[0], "postmaster.pid")
        if os.access(lock, os.R_OK):
            found.append(int(lock.read_text().split()[0]))
        return found

    def read(self) -> Reading:
        """Return the counters now."""
        now = time.perf_counter()
        cpu = cpu_seconds(self.trees, self.alone)
        row = self.connection.execute(
            "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, pg_current_wal_insert_lsn() - '0/0'"
        ).fetchone()
        assert row is not None
        stats = self.redis.info("stats")
        calls = self.redis.info("commandstats")
        return Reading(
            now,
            cpu,
            int(row[0]),
            int(row[1]),
            int(calls.get("cmdstat_lpush", {}).get("calls", 0)),
            int(stats["total_commands_processed"]),
            int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"]),
        )

    def versions(self) -> str:
        """Return one line about the servers."""
        row = self.connection.execute("SELECT current_setting('server_version'), current_setting('fsync')").fetchone()
        assert row is not None
        return f"PostgreSQL {row[0]} (fsync {row[1]}), Redis {self.redis.info('server')['redis_version']}"

    def close(self) -> None:
        """Close the connections."""
        self.connection.close()
        self.redis.close()


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process."""
    for line in (Path("/proc") / str(pid) / "status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def machine() -> str:
    """Return one line about the machine and the versions."""
    names = ("celery", "kombu", "redis", "sqlalchemy", "psycopg")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1024**3
    hardware = f"{os.cpu_count()} cores ({_processor()}), {memory:.0f} GB"
    return ", ".join([hardware, f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in names)])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
