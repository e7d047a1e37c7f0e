"""`python -m bench.churn`: nothing is stuck, wrong or unjustly failed while processes are killed all the time.

* `churn`: `kill -9` every two seconds among an API and three workers, on PostgreSQL and Redis with a lease of 5 s,
  during 200 runs with maps, groups, loops, retries, commands and agents.  Every call in the sandbox's log must have a
  row in the ledger, and no budget may be overshot.
* `suspended`: `gorgon run` is stopped at random moments for four times its lease, and must end correctly.

Exits with 0 only if every target is met.  Ten minutes, and about 15 seconds for each suspended run.  `--seconds 60
--runs 20 --suspended 5` is a short version; `--only churn suspended` selects parts.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench import meters, money
from bench.budget import Finding, _database, _told
from gorgon_common import logs
from tests.support.churn import run_churn
from tests.support.processes import cluster
from tests.support.sandbox import start_sandbox
from tests.support.servers import postgres, redis_server
from tests.support.suspending import LEASES, suspended_run

SEED = 20261130
LEASE = 5.0
RECOVERY_P95 = 8.0
PARTS = ("churn", "suspended")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.churn", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--seconds", type=float, default=600.0, help="of churn")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two kills")
    parser.add_argument("--lease", type=float, default=LEASE, help="of the workers, in seconds")
    parser.add_argument("--suspended", type=int, default=100, help="runs that are suspended")
    parser.add_argument("--seed", type=int, default=SEED)
    asked = parser.parse_args(arguments)
    logs.configure("error")
    since = time.monotonic()
    print(meters.machine(), f"seed {asked.seed}", sep="\n", flush=True)
    met = True
    if "churn" in asked.only:
        met &= _told(under_churn(asked))
    if "suspended" in asked.only:
        met &= _told(while_suspended(asked))
    print(f"{time.monotonic() - since:.0f} s", "all met" if met else "NOT met", sep=", ")
    return 0 if met else 1


def under_churn(asked: argparse.Namespace) -> list[Finding]:
    """Kill processes while runs are in progress."""
    with (
        postgres(fsync=True) as admin,
        _database(admin, "churn") as url,
        redis_server() as redis_url,
        start_sandbox(latency="50ms") as sandbox,
        tempfile.TemporaryDirectory(prefix="gorgon-churn-") as folder,
        cluster(url, redis_url, sandbox, Path(folder), lease=asked.lease) as made,
    ):
        found = run_churn(
            made, sandbox, runs_=asked.runs, seconds=asked.seconds, every=asked.every, seed=asked.seed % 1000
        )
        over = money.over(made.services.budgets)
        equal = money.replayed(made.services.budgets)
    for line in (*found.stuck, *found.failed, *found.wrong, *found.unaccounted, *found.crashed):
        print(f"  {line}")
    kills = f"{found.kills['worker']} workers, {found.kills['api']} API"
    p95 = found.p95()
    return [
        Finding("runs; killed", f"{found.runs}; {kills}"),
        Finding("  ended although nobody killed them", f"{len(found.crashed)}", "0", not found.crashed),
        Finding("stuck", f"{len(found.stuck)}", "0", not found.stuck),
        Finding("wrong", f"{len(found.wrong)}", "0", not found.wrong),
        Finding("failed", f"{len(found.failed)}", "0", not found.failed),
        Finding("steps that saw their worker die", f"{found.deaths}", "> 0", found.deaths > 0),
        Finding(
            f"  {len(found.recovered)} of them asked a model again after, p95",
            f"{p95:.1f} s",
            f"< {RECOVERY_P95:g} s",
            bool(found.recovered) and p95 < RECOVERY_P95,
        ),
        Finding("calls; of them of unknown outcome", f"{found.calls:,}; {found.unknown}"),
        Finding("  not on the ledger", f"{len(found.unaccounted)}", "0", not found.unaccounted),
        Finding("over a budget", f"{over} micro-dollars", "0", over == 0),
        Finding("ledger replayed = balances", "yes" if equal else "NO", "yes", equal),
    ]


def while_suspended(asked: argparse.Namespace) -> list[Finding]:
    """Suspend `gorgon run` for longer than its lease, at random moments."""
    chance = random.Random(asked.seed)
    wrong = suspensions = 0
    with start_sandbox() as sandbox, tempfile.TemporaryDirectory(prefix="gorgon-suspended-") as folder:
        for number in range(asked.suspended):
            sandbox.clear_log()
            ended = suspended_run(Path(folder), sandbox, f"s{number}", chance)
            suspensions += len(ended.at)
            wrong += bool(ended.wrong)
            print(f"  run {number}, stopped after {ended.at} s: {ended.wrong or 'right'}", flush=True)
    return [
        Finding(f"gorgon run, suspended for {LEASES} leases", f"{asked.suspended}, {suspensions} times"),
        Finding("  not ended right", f"{wrong}", "0", not wrong),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
