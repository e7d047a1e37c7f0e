"""What a stretch of work has cost: CPU of process trees, commits and bytes of PostgreSQL, commands of Redis."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psycopg
import redis

_TICK = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pids: Iterable[int]) -> float:
    """Return the CPU time of processes and of all their children, ended ones included."""
    children: dict[int, list[int]] = {}
    times: dict[int, float] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            pid = int(entry.name)
            children.setdefault(int(fields[1]), []).append(pid)
            times[pid] = sum(map(int, fields[11:15])) / _TICK

    def tree(pid: int) -> float:
        return times.get(pid, 0.0) + sum(tree(child) for child in children.get(pid, ()))

    return sum(tree(pid) for pid in pids)


@dataclass(frozen=True, slots=True)
class Reading:
    """Counters at one moment."""

    wall: float
    cpu: float
    commits: int
    wal_bytes: int
    commands: int
    redis_bytes: int


class Meter:
    """Reads all counters of a bench."""

    def __init__(self, postgres_url: str, redis_url: str, pids: Iterable[int]) -> None:
        self.connection = psycopg.connect(postgres_url, autocommit=True)
        self.redis = redis.Redis.from_url(redis_url)
        self.pids = list(pids)

    def read(self) -> Reading:
        """Return the counters now."""
        cpu = cpu_seconds(self.pids)
        self.connection.execute("SELECT pg_stat_force_next_flush()")
        row = self.connection.execute(
            "SELECT sum(xact_commit), pg_current_wal_lsn() - '0/0' FROM pg_stat_database"
        ).fetchone()
        assert row is not None
        stats = self.redis.info("stats")
        return Reading(
            time.perf_counter(),
            cpu,
            int(row[0]),
            int(row[1]),
            int(stats["total_commands_processed"]),
            int(stats["total_net_input_bytes"]) + int(stats["total_net_output_bytes"]),
        )

    def close(self) -> None:
        """Close the connections."""
        self.connection.close()
        self.redis.close()


def machine() -> str:
    """Return one line about the machine and the versions."""
    names = ("celery", "kombu", "redis", "sqlalchemy", "psycopg")
    return f"{os.cpu_count()} cores, Python {platform.python_version()}, " + ", ".join(
        f"{name} {version(name)}" for name in names
    )
