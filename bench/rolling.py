"""`python -m bench.rolling`: workers are replaced one after the other under load, and no call is made twice.

Two workers run workflows with `limits: {max_parallel}`, most of whose steps arrive without a message.  Repeatedly, a
new worker is started, and the oldest one that holds steps gets SIGTERM.  The check is the sandbox's own log: each
prompt must appear once.  Exits with 0 only if that holds, every run has succeeded and every worker has exited with 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bench import meters
from bench.figures import Target, table
from tests.support.processes import Cluster, Process, cluster
from tests.support.running import FINISHED, eventually
from tests.support.sandbox import start_sandbox
from tests.support.servers import migrate, postgres, redis_server

RESTARTS = 20
RUNS_AT_ONCE = 6
WORKERS, SLOTS = 2, 8
LIMITED = """
name: rolling
limits: {max_parallel: 4}
inputs: {run: {type: integer, required: true}}
steps:
  - id: each
    map: {over: "{{[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]}}", as: n}
    provider: openai
    prompt: "[[sandbox: delay=2s]] Item {{n}} of {{inputs.run}}"
  - {id: one, provider: anthropic, prompt: "[[sandbox: delay=2s]] One of {{inputs.run}}"}
  - {id: two, prompt: "[[sandbox: delay=2s]] Two of {{inputs.run}} {{one.status}}"}
  - {id: end, prompt: "End of {{inputs.run}} {{two.status}} {{each.status}}"}
"""
CALLS = 15


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.rolling", description=__doc__.split("\n")[0])
    parser.add_argument("--restarts", type=int, default=RESTARTS)
    asked = parser.parse_args(arguments)
    since = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="gorgon-bench-") as folder,
        postgres() as database,
        redis_server() as broker,
        start_sandbox(limits=[]) as sandbox,
    ):
        migrate(database)
        with cluster(database, broker, sandbox, Path(folder)) as made:
            runs, codes, longest = _roll(made, asked.restarts)
            ended = [made.wait(run, within=300) for run in runs]
            calls = Counter(entry["prompt"] for entry in sandbox.log())
    twice = sum(count - 1 for count in calls.values())
    recovered = sum(event["kind"] == "step.recovered" for ran in ended for event in ran.events)
    found = [
        Target("workers replaced", len(codes), "count"),
        Target("calls", sum(calls.values()), "count", CALLS * len(runs), below=True),
        Target("calls made twice", twice, "count", 0, below=True),
        Target("runs that did not succeed", sum(ran.status != "succeeded" for ran in ended), "count", 0, below=True),
        Target("workers that gave steps back", sum(code != 0 for code in codes), "count", 0, below=True),
        Target("steps that were taken over", recovered, "count", 0, below=True),
        Target("longest stop", longest, "seconds"),
    ]
    print(table(found), f"{meters.machine()}; {time.monotonic() - since:.0f} s", sep="\n\n", flush=True)
    return 0 if all(target.met for target in found) else 1


def _roll(made: Cluster, restarts: int) -> tuple[list[str], list[int], float]:
    """Replace workers under load; return the runs, the exit codes, and the duration of the slowest stop in seconds."""
    for _ in range(WORKERS):
        made.worker(slots=SLOTS, wait=False)
    for process in made.processes:
        process.wait_ready()
    runs: list[str] = []
    codes: list[int] = []
    longest = 0.0
    for number in range(restarts):
        made.worker(slots=SLOTS)
        _load(made, runs)
        old = eventually(lambda: _holder(made), within=60, what="a worker that holds steps")
        made.processes.remove(old)
        begun = time.monotonic()
        old.send(signal.SIGTERM)
        codes.append(old.wait(120))
        longest = max(longest, time.monotonic() - begun)
        print(f"{number + 1} of {restarts}: exit code {codes[-1]}, {len(runs)} runs", file=sys.stderr, flush=True)
    return runs, codes, longest


def _load(made: Cluster, runs: list[str]) -> None:
    """Submit runs until enough of them are in progress."""
    under_way = sum(made.services.run(run)["status"] not in FINISHED for run in runs)
    for _ in range(RUNS_AT_ONCE - under_way):
        runs.append(made.start(LIMITED, {"run": len(runs)}))


def _holder(made: Cluster) -> Process | None:
    """Return the oldest worker that is running steps."""
    with made.services.database.read() as connection:
        names = connection.exec_driver_sql(
            "SELECT DISTINCT workers.name FROM steps JOIN workers ON workers.id = steps.owner WHERE steps.status = 2"
        ).scalars()
        holding = {int(name.rpartition(":")[2]) for name in names}
    return next((process for process in made.processes[:-1] if process.pid in holding), None)


if __name__ == "__main__":
    os.environ["GORGON_ENV_FILE"] = ""
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.exit(main())
