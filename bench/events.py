"""`python -m bench.events`: what Celery's events and remote control cost, which `gorgon worker --events` turns on.

Two workers that differ only in `--events` and `--no-events`, each with a database of its own on the same PostgreSQL
(fsync on) and the same Redis, and a sandbox without latency.  They run the same work in pairs of blocks.  CPU is
that of the worker, PostgreSQL, Redis and the submitting process, for each step.

Exits with 0 only where events cost at most 5 % of a step that calls a model.  `--blocks` sets how
many pairs there are of each kind of work.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import psycopg

from bench import meters, shapes
from bench.figures import Target, table
from bench.meters import Meter
from tests.support.processes import Cluster, Process, cluster
from tests.support.running import FINISHED
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.servers import migrate, postgres, redis_server
from tests.support.services import Services

BLOCKS = 24
LIMIT = 0.05
SETTLE_SECONDS = 0.6
"""Events are sent up to half a second after what they tell of."""
SIDES = {"off": "--no-events", "on": "--events"}
SLOTS = 8
LONE = "name: lone\nsteps: [{id: ask, provider: openai, prompt: Say something}]\n"
MAPPED = """
name: mapped
inputs: {n: {type: array, items: {type: integer}, required: true}}
steps: [{id: ask, map: {over: "{{inputs.n}}", as: n}, provider: openai, prompt: "Say {{n}}"}]
"""
FREE = "openai: {models: {'*': {requests: 10000000, tokens: 10000000000}}}\n"
RUNS, ITEMS, NOOPS = 100, 100, 1000
RUN_SECONDS = 120.0

Work = Callable[[Cluster], None]


def lone(made: Cluster) -> None:
    """Many runs of one call each: a message for every call, the most that events can cost."""
    for run in [made.start(LONE) for _ in range(RUNS)]:
        _wait(made.services, run)


def mapped(made: Cluster) -> None:
    """One run with a map of calls: a message for several calls."""
    _wait(made.services, made.start(MAPPED, {"n": list(range(ITEMS))}))


def noops(made: Cluster) -> None:
    """One run of steps that do nothing."""
    _wait(made.services, made.services.submit(shapes.plan(shapes.fan_out(NOOPS)), {}).run_id)


WORK: dict[str, tuple[Work, int, bool]] = {
    "runs of one call": (lone, RUNS, True),
    "a map of calls": (mapped, ITEMS, True),
    "no-op steps, fan-out": (noops, NOOPS, False),
}
"""Name → what runs it, how many steps that are, whether they are calls."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.events", description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="pairs of blocks of each kind of work")
    asked = parser.parse_args(arguments)
    since = time.monotonic()
    with _both() as sides:
        found = [target for name in WORK for target in _compared(name, sides, asked.blocks)]
    print(table(found), f"{meters.machine()}; {time.monotonic() - since:.0f} s", sep="\n\n", flush=True)
    return 0 if all(target.met for target in found) else 1


def _compared(name: str, sides: dict[str, tuple[Cluster, Meter]], blocks: int) -> Iterator[Target]:
    """Run short blocks in pairs, the order turned round each time: yield the costs per step and their ratio.

    What else the machine does changes slowly, so that it makes both blocks of a pair dearer.
    """
    work, steps, calls = WORK[name]
    spent: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(blocks + 1):
        for side in sides if number % 2 else reversed(sides):
            made, meter = sides[side]
            before = meter.read()
            work(made)
            time.sleep(SETTLE_SECONDS)
            if number:  # the first warms up
                spent[side].append(meter.read().since(before, steps).cpu)
    medians = {side: statistics.median(costs) for side, costs in spent.items()}
    ratios = [on / off - 1 for off, on in zip(spent["off"], spent["on"], strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4)
    note = f"half of the pairs: {first:+.1%} to {third:+.1%}"
    yield Target(f"{name}: CPU ms a step, events off", round(medians["off"], 3), "ratio")
    yield Target(f"{name}: CPU ms a step, events on", round(medians["on"], 3), "ratio")
    share = statistics.median(ratios)
    yield Target(f"{name}: events", share, "percent", LIMIT if calls else None, below=True, note=note)
    print(f"{name}: {medians} {share:+.2%}", file=sys.stderr, flush=True)


def _wait(services: Services, run: str) -> None:
    until = time.monotonic() + RUN_SECONDS
    while (status := services.run(run)["status"]) not in FINISHED:
        if time.monotonic() > until:
            raise RuntimeError(f"a run did not end within {RUN_SECONDS:.0f} s")
        time.sleep(0.01)
    if status != "succeeded":
        raise RuntimeError(f"a run failed: {services.run(run)['error']}")


@contextlib.contextmanager
def _both() -> Iterator[dict[str, tuple[Cluster, Meter]]]:
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gorgon-bench-")))
        (folder / "limits.yaml").write_text(FREE)
        admin = stack.enter_context(postgres())
        broker = stack.enter_context(redis_server())
        sandbox = stack.enter_context(start_sandbox(limits=[]))
        yield {
            side: stack.enter_context(_side(admin, broker, sandbox, folder, side, number))
            for number, side in enumerate(SIDES)
        }


@contextlib.contextmanager
def _side(
    admin: str, broker: str, sandbox: Sandbox, folder: Path, side: str, number: int
) -> Iterator[tuple[Cluster, Meter]]:
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE events_{side}".encode())
    url = urlunsplit(urlsplit(admin)._replace(path=f"/events_{side}"))
    redis_url = f"{broker.removesuffix('/0')}/{number}"
    migrate(url)
    with cluster(url, redis_url, sandbox, folder) as made:
        made.environment |= {"GORGON_LIMITS_FILE": str(folder / "limits.yaml")}
        process = Process("worker", SIDES[side], "--slots", str(SLOTS), ready="ready", environment=made.environment)
        made.processes.append(process)
        process.wait_ready()
        with contextlib.closing(Meter(url, redis_url, [process.pid], [os.getpid()])) as meter:
            yield made, meter


if __name__ == "__main__":
    os.environ["GORGON_ENV_FILE"] = ""
    sys.exit(main())
