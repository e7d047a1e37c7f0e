"""`python -m bench.parallel`: steps run in parallel.  Exits with 0 only if both targets are met.

* 20 independent agent steps of 500 ms on the sandbox, by `gorgon run FILE --json` (SQLite, all in one process): less
  than 1.5 s from the first `started_at` to the last `finished_at`.
* A random DAG of 200 steps of 200–500 ms on PostgreSQL (fsync on), Redis and worker processes: at most 1.10 times its
  critical path from its submission to its end.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

from bench import meters, report, shapes
from bench.report import Figure
from bench.sides import Gorgon, servers
from gorgon_common import queues

STEPS, LATENCY = 20, "500ms"
SECONDS = 1.5
DAG_STEPS, SHORTEST_MS, LONGEST_MS = 200, 200, 500
STRETCH = 1.10
WORKERS, SLOTS = 2, 50
_GORGON = Path(sys.executable).with_name("gorgon")


def main() -> int:
    """Measure and print; return the exit code."""
    found = [independent(), critical()]
    print(meters.machine(), report.figures(found, markdown=False), sep="\n\n")
    return 0 if all(figure.met for figure in found) else 1


def independent() -> Figure:
    """Run 20 steps without dependencies."""
    steps = [{"id": f"s{number}", "role": "planner", "prompt": f"Plan part {number}."} for number in range(STEPS)]
    with tempfile.TemporaryDirectory(prefix="gorgon-parallel-") as folder:
        file = Path(folder, "parallel.yaml")
        file.write_text(json.dumps({"name": "parallel", "steps": steps}))  # JSON is YAML
        kept = {name: value for name, value in os.environ.items() if not name.startswith("GORGON_")}
        done = subprocess.run(
            [str(_GORGON), "run", str(file), "--json"],
            env={**kept, "GORGON_HOME": folder, "GORGON_ENV_FILE": "", "GORGON_SANDBOX_LATENCY": LATENCY},
            cwd=folder,
            stdout=subprocess.PIPE,
            check=True,
        )
    run = json.loads(done.stdout)
    if run["status"] != "succeeded" or len(run["steps"]) != STEPS:
        raise RuntimeError(f"the run is not what it should be: {run['status']}, {len(run['steps'])} steps")
    started = min(datetime.fromisoformat(step["started_at"]) for step in run["steps"])
    finished = max(datetime.fromisoformat(step["finished_at"]) for step in run["steps"])
    seconds = (finished - started).total_seconds()
    name = f"{STEPS} independent steps of {LATENCY} (sandbox, gorgon run)"
    return Figure(name, seconds, f"{seconds:.2f} s", SECONDS, f"≤ {SECONDS} s")


def critical(seed: int = 7) -> Figure:
    """Run a random DAG of steps that take some time."""
    deps = shapes.dag(DAG_STEPS, seed)
    chance = random.Random(seed)
    taken = [chance.randint(SHORTEST_MS, LONGEST_MS) for _ in deps]
    path = shapes.critical_path(deps, taken) / 1000
    plan = shapes.plan(deps, "critical", milliseconds=taken, on=[queues.HTTP])
    with tempfile.TemporaryDirectory(prefix="gorgon-parallel-") as folder, servers() as both:
        gorgon = Gorgon(both, Path(folder))
        try:
            with gorgon.workers([[queues.HTTP]] * WORKERS, SLOTS):
                since = time.perf_counter()
                gorgon.run(plan)
                seconds = time.perf_counter() - since
        finally:
            gorgon.close()
    name = f"random DAG of {DAG_STEPS} steps of {SHORTEST_MS}–{LONGEST_MS} ms / its critical path ({path:.2f} s)"
    ratio = seconds / path
    return Figure(name, ratio, f"{ratio:.3f}", STRETCH, f"≤ {STRETCH:.2f}")


if __name__ == "__main__":
    sys.exit(main())
