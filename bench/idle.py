"""`python -m bench.idle`: what Gorgon costs while it has nothing to do, and how much memory its workers hold.

One API, three workers that serve every queue, PostgreSQL with fsync and Redis, all started as an operator would.

* CPU with nothing waiting, and with 1,000 runs that wait for a quota: all processes together, as a share of one core.
* Memory of one worker that has made 2,500 calls to models, half of them to each provider.

Exits with 0 only if every target is met.  Three minutes on two cores; `--seconds` sets how long each phase is
measured, `--only idle waiting memory` selects parts.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psycopg
import redis

from bench import meters
from bench.figures import Target, table
from tests.support.processes import Cluster, Process, cluster
from tests.support.running import FINISHED
from tests.support.sandbox import start_sandbox
from tests.support.servers import migrate, postgres, redis_server

PARTS = ("idle", "waiting", "memory")
WORKERS = 3
WAITING = 1_000
CALLS = 2_500
"""Calls to models by one worker, half of them to each provider."""
SECONDS = 60.0
SETTLE_SECONDS = 30.0
"""After their start, workers still import the SDKs of the providers."""
CPU = 0.01
MEMORY_MB = 150.0
QUOTA = "openai: {models: {'*': {requests: 6}}}\nanthropic: {models: {'*': {requests: 1000000}}}\n"
FREE = "\n".join(
    f"{name}: {{models: {{'*': {{requests: 10000000, tokens: 10000000000}}}}}}" for name in ("openai", "anthropic")
)
WAITS = "name: waits\nsteps: [{id: ask, provider: openai, prompt: Wait}]\n"
CALLING = """
name: calls
inputs: {n: {type: array, items: {type: integer}, required: true}}
steps:
  - {id: one, map: {over: "{{inputs.n}}", as: n}, provider: openai, prompt: "One {{n}}"}
  - {id: two, map: {over: "{{inputs.n}}", as: n}, provider: anthropic, prompt: "Two {{n}}"}
"""
ITEMS = 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.idle", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=SECONDS, help="how long each stretch is measured")
    asked = parser.parse_args(arguments)
    since = time.monotonic()
    print(meters.machine(), file=sys.stderr, flush=True)
    found: list[Target] = []
    if {"idle", "waiting"} & set(asked.only):
        with _started(QUOTA) as system:
            if "idle" in asked.only:
                found.append(_told(system.share("CPU, nothing waiting", asked.seconds)))
            if "waiting" in asked.only:
                system.wait_for_a_quota()
                found.append(_told(system.share(f"CPU, {WAITING:,} runs waiting for a quota", asked.seconds)))
    if "memory" in asked.only:
        with _started(FREE, workers=1) as system:
            found += map(_told, system.memory())
    print(table(found), f"{meters.machine()}; {time.monotonic() - since:.0f} s", sep="\n\n", flush=True)
    return 0 if all(target.met for target in found) else 1


def _told(found: Target) -> Target:
    print(" ".join(part for part in found.row if part), file=sys.stderr, flush=True)
    return found


class System:
    """All processes, and their resource usage."""

    def __init__(self, made: Cluster, api: Process, database_url: str, redis_url: str) -> None:
        self.cluster = made
        with psycopg.connect(database_url) as connection:
            row = connection.execute("SHOW data_directory").fetchone()
        assert row is not None
        with redis.Redis.from_url(redis_url) as client:
            server = int(client.info("server")["process_id"])
        self.trees: Mapping[str, Sequence[int]] = {
            "API": [api.pid],
            "workers": [process.pid for process in made.processes],
            "PostgreSQL": [int(Path(row[0], "postmaster.pid").read_text().split()[0])],
            "Redis": [server],
        }

    def _used(self) -> dict[str, float]:
        return {name: meters.cpu_seconds(trees) for name, trees in self.trees.items()}

    def share(self, name: str, seconds: float) -> Target:
        """Return the CPU usage of all idle processes, as a share of one core."""
        time.sleep(SETTLE_SECONDS)
        since, before = time.monotonic(), self._used()
        time.sleep(seconds)
        wall = time.monotonic() - since
        parts = {part: (used - before[part]) / wall for part, used in self._used().items()}
        note = ", ".join(f"{part} {used:.2%}" for part, used in parts.items())
        return Target(name, sum(parts.values()), "percent", CPU, below=True, note=note)

    def wait_for_a_quota(self) -> None:
        """Submit runs and wait until all that are not running are waiting."""
        for _ in range(WAITING):
            self.cluster.start(WAITS)
        until = time.monotonic() + 120
        while time.monotonic() < until:
            with self.cluster.services.database.read() as connection:
                ready = connection.exec_driver_sql("SELECT count(*) FROM steps WHERE status IN (1, 2)").scalar_one()
            if not ready:
                return
            time.sleep(0.5)
        raise RuntimeError(f"{ready} of {WAITING} steps do not wait after two minutes")

    def memory(self) -> list[Target]:
        """Make calls, and return the memory of the worker before and after."""
        begun = self._largest()
        numbers = list(range(ITEMS))
        runs = [self.cluster.start(CALLING, {"n": numbers}) for _ in range(CALLS // (2 * ITEMS))]
        until = time.monotonic() + 600
        for run in runs:
            while self.cluster.services.run(run)["status"] not in FINISHED:
                if time.monotonic() > until:
                    raise RuntimeError("the calls did not end within ten minutes")
                time.sleep(0.2)
        failed = [run for run in runs if self.cluster.services.run(run)["status"] != "succeeded"]
        if failed:
            raise RuntimeError(f"a run failed: {self.cluster.services.run(failed[0])['error']}")
        return [
            Target("memory of a worker that has just started, MB", begun, "count"),
            Target(f"memory of a worker after {CALLS:,} calls, MB", self._largest(), "count", MEMORY_MB, below=True),
        ]

    def _largest(self) -> float:
        return max(meters.resident_bytes(pid) for pid in self.trees["workers"]) / 1024**2


@contextlib.contextmanager
def _started(limits: str, workers: int = WORKERS) -> Iterator[System]:
    """Start all processes; `limits` is the text of the limits file."""
    with (
        tempfile.TemporaryDirectory(prefix="gorgon-bench-") as name,
        postgres() as database,
        redis_server() as broker,
        start_sandbox(limits=[]) as sandbox,
    ):
        folder = Path(name)
        path = folder / "limits.yaml"
        path.write_text(limits)
        migrate(database)
        with cluster(database, broker, sandbox, folder) as made:
            made.environment |= {"GORGON_LIMITS_FILE": str(path), "GORGON_API_KEY": "gk_of_the_benchmark"}
            api = Process("api", "--port", "0", ready="Gorgon API at", environment=made.environment)
            for _ in range(workers):
                made.worker(slots=50, wait=False)
            try:
                for process in (api, *made.processes):
                    process.wait_ready()
                yield System(made, api, database, broker)
            finally:
                api.terminate()


if __name__ == "__main__":
    os.environ["GORGON_ENV_FILE"] = ""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling all modules at every start takes memory too
    sys.exit(main())
