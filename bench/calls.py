"""`python -m bench.calls`: what a step costs on the path that people pay for: agent steps of a YAML file.

Three sides of each shape, all compiled from YAML: `aggregate` steps, which need no provider; agent steps on a provider
that answers at once; the same with limiter and a budget.  With `--milliseconds 20`, each call takes that long;
`--runs 50` starts that many runs at once.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import shapes
from bench.meters import Meter, Reading
from bench.sides import SETTLE_SECONDS, Fleet, Gorgon, servers
from gorgon_common.workflow.plan import Plan

WORKERS, SLOTS = 2, 8
SHAPES = {"chain": shapes.chain, "fan-out": shapes.fan_out, "dag": shapes.dag, "map-reduce": shapes.fan_in}


def workflow(name: str, steps: int, side: str) -> str:
    """Return a workflow file of a shape."""
    budget = {"limits": {"budget_usd": 1000.0}} if side == "limited" else {}
    agent = {"provider": "openai", "model": "gpt-4o", "prompt": "go", "max_tokens": 50}
    work: dict[str, Any] = {"aggregate": {"from": [1], "how": "first"}} if side == "aggregate" else agent
    head = {"name": f"bench-{name}", **budget}
    if name == "map-reduce":
        over = [str(number) for number in range(steps - 1)]
        mapped = {"over": over, "as": "part", "max_items": 10_000, "reduce": work}
        return json.dumps({**head, "steps": [{"id": "each", **work, "map": mapped}]})
    listed = [
        {"id": f"s{number}", **work, **({"depends_on": [f"s{before}" for before in after]} if after else {})}
        for number, after in enumerate(SHAPES[name](steps))
    ]
    return json.dumps({**head, "steps": listed})


def compiled(gorgon: Gorgon, name: str, steps: int, side: str) -> Plan:
    """Return the plan of a shape, through the loader."""
    return gorgon.services.read(workflow(name, steps, side))[0]


@contextlib.contextmanager
def workers(gorgon: Gorgon, *, milliseconds: float, limited: bool) -> Iterator[Fleet]:
    """Start the workers."""
    command = [sys.executable, "-m", "bench.call_worker", "openai", "--slots", str(SLOTS)]
    command += ["--milliseconds", str(milliseconds), *([] if limited else ["--unlimited"])]
    fleet = Fleet([command] * WORKERS, gorgon._environment, gorgon.folder / "calls.log")
    try:
        until = time.monotonic() + 60
        while len(gorgon.listening()) < WORKERS:
            fleet.check()
            if time.monotonic() > until:
                raise RuntimeError(f"the workers did not start:\n{fleet.log.read_text()[-2000:]}")
            time.sleep(0.05)
        for _ in range(4):
            gorgon.run(compiled(gorgon, "fan-out", 100, "limited" if limited else "agent"))
        yield fleet
    finally:
        fleet.stop()


def block(gorgon: Gorgon, meter: Meter, plan: Plan, steps: int) -> Reading:
    """Run a plan once; return the cost of a step."""
    before = meter.read()
    gorgon.run(plan)
    time.sleep(SETTLE_SECONDS)
    return meter.read().since(before, steps)


def many(gorgon: Gorgon, meter: Meter, plan: Plan, steps: int, runs: int) -> tuple[Reading, list[float]]:
    """Run a plan many times at once; return the cost of a step, and how long each tenth of the steps took (seconds)."""

    def ended() -> int:
        row = gorgon.connection.execute("SELECT count(*) FROM checkpoints").fetchone()
        assert row is not None
        return int(row[0])

    total, ended_before = runs * steps, ended()
    before, tenths = meter.read(), [time.perf_counter()]
    names = [gorgon.services.submit(plan, {}).run_id for _ in range(runs)]
    while len(tenths) <= 10:
        time.sleep(0.25)
        while len(tenths) <= 10 and ended() - ended_before >= total * len(tenths) / 10:
            tenths.append(time.perf_counter())
    for name in names:
        gorgon.wait(name)
    found = meter.read().since(before, total)
    return found, [later - earlier for earlier, later in itertools.pairwise(tenths)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m bench.calls", description=__doc__)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--sides", default="aggregate,agent,limited")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--milliseconds", type=float, default=0.0, help="what a call takes")
    parser.add_argument("--runs", type=int, default=1, help="so many runs at once, e.g. 50")
    asked = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gorgon-bench-")))
        both = stack.enter_context(servers())
        gorgon = Gorgon(both, folder)
        stack.callback(gorgon.close)
        for side in asked.sides.split(","):
            limited = side == "limited"
            with workers(gorgon, milliseconds=asked.milliseconds, limited=limited) as fleet:
                meter = Meter(both.gorgon_url, both.redis_url, fleet.pids, [os.getpid()])
                for name in asked.shapes.split(","):
                    plan = compiled(gorgon, name, asked.steps, side)
                    if asked.runs > 1:
                        spent, tenths = many(gorgon, meter, plan, asked.steps, asked.runs)
                        rates = ", ".join(f"{asked.runs * asked.steps / 10 / seconds:.0f}" for seconds in tenths)
                        print(
                            f"{side:10} {name:11} {spent.cpu:6.3f} CPU ms, {1000 / spent.wall:6.0f} steps/s; "
                            f"by tenths: {rates}",
                            flush=True,
                        )
                        continue
                    best = min(
                        (block(gorgon, meter, plan, asked.steps) for _ in range(asked.rounds)), key=lambda r: r.cpu
                    )
                    print(
                        f"{side:10} {name:11} {best.cpu:6.3f} CPU ms, {best.wall:6.3f} ms, "
                        f"{best.commits:5.2f} commits, {best.messages:5.2f} messages, "
                        f"{best.commands:5.1f} Redis commands a step",
                        flush=True,
                    )
                meter.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
