"""`python -m bench.budget` (`make bench-budget`): no budget is ever overshot, whatever runs at once and is killed.

* Reservations from 16 processes on a two-level hierarchy, with duplicates and with kills before settling: 0
  micro-dollars over, the replayed ledger equals the balances, no false refusal once everything is settled, at least
  500 cycles a second.
* 200 concurrent runs on worker processes against a budget that fits 120.5 of them: never over, 120 complete, refusals
  say which budget is short and by how much, and the sum of the ledger equals the sandbox's own bill.

* The estimates of `plan` for every bundled workflow, compared with its runs on the sandbox (`bench.forecast`).

The control for the first two is the naive check-then-add, which must overshoot; the control for the third is plans with
halved figures, which must fail.  Exits with 0 only if every target is met.  PostgreSQL with fsync, Redis, about seven
minutes on two cores; `--quick` makes fewer reservations; `--only reservations runs forecast` selects parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import psycopg
from sqlalchemy import func, select

from bench import forecast, meters, money
from gorgon_common import logs
from gorgon_common.costs.budgets import LEVELS, Account, Shortage, dollars
from gorgon_common.engine.budget import Held
from gorgon_common.engine.records import RunInfo
from gorgon_common.persistence import settling, upgrade
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.tables import budget_waits, ledger, reservations
from gorgon_common.settings import EMBEDDED_BROKER, Settings
from gorgon_common.workflow import catalogue
from gorgon_worker.embedded import embedded
from gorgon_worker.process_owner import new_home
from tests.support.processes import Cluster, cluster
from tests.support.running import FINISHED, Lab
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.servers import postgres, redis_server
from tests.support.services import build

SEED = 20261122
PROCESSES, THREADS, LEAVES = 16, 8, 8
ATTEMPTS, QUICK_ATTEMPTS = 100_000, 8_000
CYCLES_PER_SECOND = 500
LOWEST, HIGHEST = 1, 1000
"""Micro-dollars of a call's bound; its actual cost is a part of that."""
ENOUGH = 0.85
"""The root's limit as a share of what all attempts together would spend, so that the last ones are refused."""
KILLS = 6
SETTLED_ATTEMPTS = 2_000
NAIVE_ATTEMPTS = 4_000
RUNS, FITTING = 200, 120.5
WORKERS, SLOTS = 2, 50
WORKFLOW = """
name: paid
team: bench
limits: {on_budget: %s}
steps:
  - id: ask
    provider: openai
    model: gpt-6.1-terra
    max_tokens: 1024
    prompt: '[[sandbox: usage={"output": 900} text=done]] Part {{inputs.part}}.'
inputs: {part: string}
outputs: {said: "{{ask.output}}"}
"""
RUN_SECONDS = 120.0
PARTS = ("reservations", "runs", "forecast")
FORECAST_TURNS = 3
WIDTH = 52


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure and its target.  `met` is None if there is no target."""

    name: str
    shown: str
    target: str = ""
    met: bool | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and print; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.budget", description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer reservations, each workflow once: three minutes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    logs.configure("error")  # these budgets are meant to be used up
    if asked.child:
        _child(json.loads(asked.child))
        return 0
    since = time.monotonic()
    print(meters.machine(), f"seed {asked.seed}", sep="\n", flush=True)
    met = True
    if "reservations" in asked.only:
        with postgres(fsync=True) as url:
            met &= _told(reservations_at_once(url, QUICK_ATTEMPTS if asked.quick else ATTEMPTS, asked.seed))
            met &= _told(naive_reservations(url, asked.seed))
    if "runs" in asked.only:
        with postgres(fsync=True) as url:
            met &= _told(runs_at_once(url))
    if "forecast" in asked.only:
        met &= _told(plans_against_runs(1 if asked.quick else FORECAST_TURNS, asked.seed))
    print(f"{time.monotonic() - since:.0f} s", "all met" if met else "NOT met", sep=", ")
    return 0 if met else 1


def _told(found: Sequence[Finding]) -> bool:
    """Print the figures of a part; return whether each target is met."""
    for finding in found:
        verdict = "" if finding.met is None else "met" if finding.met else "MISSED"
        print(f"{finding.name.ljust(WIDTH)}  {finding.shown:>24}  {finding.target:<26}  {verdict}", flush=True)
    return all(finding.met is not False for finding in found)


@contextlib.contextmanager
def _database(admin: str, name: str) -> Iterator[str]:
    with psycopg.connect(admin, autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')  # type: ignore[call-overload]  # ours
    url = urlunsplit(urlsplit(admin)._replace(path=f"/{name}"))
    upgrade(url)
    yield url


# Reservations from many processes


def accounts(leaf: int, total: int) -> list[Account]:
    """Return a leaf and the root.  The leaves together have a tenth more than the root."""
    share = total * 11 // (10 * LEAVES)
    return [
        Account(f"leaf:{leaf}", LEVELS["team"], f"team {leaf}", share, None),
        Account("root", LEVELS["org"], "the org", total, None),
    ]


def _info() -> RunInfo:
    return RunInfo(1, "run", 1, "bench", "bench", "", {}, "live", "", 1, datetime.now(UTC))


def _child(given: dict[str, Any]) -> None:
    """Reserve and settle in a few threads; counts go to stdout as JSON lines, one for every hundred attempts."""
    mine = Budgets(Database(given["url"], pool_size=1))
    mine.applying(_info())
    print("ready", flush=True)
    sys.stdin.readline()
    tally = _Tally(given["attempts"])
    threads = [threading.Thread(target=_attempts, args=(given, mine, tally, thread)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tally.tell()
    mine.close()


class _Tally:
    """The counts of the threads of a process."""

    def __init__(self, attempts: int) -> None:
        self.left = attempts
        self.counts = {"attempts": 0, "cycles": 0, "refused": 0, "falsely": 0, "duplicates": 0, "broken": 0}
        self._lock = threading.Lock()

    def another(self) -> bool:
        with self._lock:
            self.left -= 1
            return self.left >= 0

    def add(self, **more: int) -> None:
        with self._lock:
            for name, count in more.items():
                self.counts[name] += count
            self.counts["attempts"] += 1
            if self.counts["attempts"] % 100 == 0:
                self.tell()

    def tell(self) -> None:
        print(json.dumps(self.counts), flush=True)


def _attempts(given: dict[str, Any], mine: Budgets, tally: _Tally, thread: int) -> None:
    chance = random.Random(f"{given['seed']}:{given['child']}:{given['life']}:{thread}")
    info = _info()
    number = 0
    while tally.another():
        number += 1
        amount = chance.randint(LOWEST, HIGHEST)
        own = accounts(chance.randrange(LEAVES), given["total"])
        key = (given["child"] << 20 | given["life"] << 10 | thread, number, 1)
        answer = mine.reserve(key, info, own, usd=amount, tokens=0, max_tokens=1)
        duplicate = chance.random() < 0.05
        broken = 0
        if duplicate:
            again = mine.reserve(key, info, own, usd=amount, tokens=0, max_tokens=1)
            broken = isinstance(answer, Held) and again != answer
            answer = again
        if isinstance(answer, Shortage):
            tally.add(refused=1, falsely=answer.balance.fits(amount, 0), duplicates=duplicate, broken=broken)
            continue
        fact = {
            "step_id": key[0],
            "token": key[1],
            "ordinal": 1,
            "state": 1,
            "usd": chance.randint(0, amount),
            "tokens": 0,
        }
        facts = [fact, fact] if chance.random() < 0.05 else [fact]
        for _ in facts:
            mine.settle(facts)
        tally.add(cycles=1, duplicates=duplicate, broken=broken)


class _Crew:
    """The child processes; a killed one is replaced by one that continues after it."""

    def __init__(self, url: str, seed: int, attempts: int, total: int) -> None:
        share = attempts // PROCESSES
        self.given = {"url": url, "seed": seed, "total": total, "share": share}
        self.children = [self._start(child, 0, share) for child in range(PROCESSES)]
        self.killed = 0

    def _start(self, child: int, life: int, attempts: int) -> subprocess.Popen[str]:
        given = {**self.given, "child": child + 1, "life": life, "attempts": attempts}
        command = [sys.executable, "-m", "bench.budget", "--child", json.dumps(given)]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, chance: random.Random) -> tuple[list[dict[str, int]], float]:
        """Let them run, and kill a few; return the last report of each, and the seconds."""
        for child in self.children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        begun = time.monotonic()
        for child in self.children:
            _go(child)
        last: dict[int, list[str]] = {}
        done: list[dict[str, int]] = []
        lines = self.given["share"] // 100
        places = chance.sample(range(PROCESSES), KILLS)
        doomed = {place: chance.randint(1, max(1, lines - 2)) for place in places}
        waiting = dict(enumerate(self.children))
        while waiting:
            for place, child in list(waiting.items()):
                assert child.stdout is not None
                line = child.stdout.readline()  # each reports after every hundred attempts
                if line:
                    last.setdefault(place, []).append(line)
                    if len(last[place]) == doomed.get(place):
                        os.kill(child.pid, signal.SIGKILL)
                    continue
                del waiting[place]
                if last.get(place):
                    done.append(json.loads(last[place][-1]))
                if child.wait() == -signal.SIGKILL:
                    self.killed += 1
                    doomed.pop(place)
                    told = done[-1]["attempts"] if last.get(place) else 0
                    after = self._start(place, 1, self.given["share"] - told)
                    assert after.stdout is not None
                    after.stdout.readline()
                    _go(after)
                    waiting[place] = after
                    last[place] = []
                elif child.returncode:
                    raise RuntimeError(f"a process ended with {child.returncode}")
        return done, time.monotonic() - begun


def _go(child: subprocess.Popen[str]) -> None:
    assert child.stdin is not None
    child.stdin.write("go\n")
    child.stdin.close()


def reservations_at_once(admin: str, attempts: int, seed: int) -> list[Finding]:
    """Reserve and settle from 16 processes, kill some, and check the result."""
    total = int(attempts * (LOWEST + HIGHEST) / 4 * ENOUGH)
    with _database(admin, "reservations") as url:
        crew = _Crew(url, seed, attempts, total)
        done, seconds = crew.run(random.Random(seed))
        database = Database(url)
        mine = Budgets(database)
        with database.read() as connection:
            left = connection.scalars(select(reservations.c.step_id).where(reservations.c.state == 0)).all()
            held = connection.scalar(select(func.count()).select_from(reservations))
        with database.write() as connection:
            settling.abandon(connection, set(left))
        over = money.over(mine)
        equal = money.replayed(mine)
        false_sequential = _settled_history(mine, total, seed)
        mine.close()
        database.close()
    summed = {name: sum(entry[name] for entry in done) for name in done[0]}
    rate = summed["cycles"] / seconds
    return [
        Finding(f"reservations tried, {PROCESSES} processes of {THREADS} threads", f"{summed['attempts']:,}"),
        Finding("  of them held, refused", f"{held:,}, {summed['refused']:,}", "both", summed["refused"] > 0),
        Finding("  asked for twice", f"{summed['duplicates']:,}"),
        Finding("  of them with two answers", f"{summed['broken']}", "0", summed["broken"] == 0),
        Finding("processes killed before settling", f"{crew.killed}", "> 0", crew.killed > 0),
        Finding("  reservations they left open", f"{len(left)}"),
        Finding("over a budget", dollars(over), "0", over == 0),
        Finding("ledger replayed = balances", "yes" if equal else "NO", "yes", equal),
        Finding("refused with room in the same moment", f"{summed['falsely']}", "0", summed["falsely"] == 0),
        Finding(
            "wrong answers, settled history", f"{false_sequential} of {SETTLED_ATTEMPTS:,}", "0", not false_sequential
        ),
        Finding("cycles a second", f"{rate:,.0f}", f">= {CYCLES_PER_SECOND}", rate >= CYCLES_PER_SECOND),
    ]


def _settled_history(mine: Budgets, total: int, seed: int) -> int:
    """Reserve one by one, settling in between, and compare with independent sums; return the count of wrong answers."""
    chance = random.Random(seed + 1)
    own = [
        Account("alone", LEVELS["team"], "alone", 500_000, None),
        Account("top", LEVELS["org"], "top", 450_000, None),
    ]
    spent = wrong = 0
    for number in range(SETTLED_ATTEMPTS):
        amount = chance.randint(LOWEST, HIGHEST)
        key = (999 << 20, number, 1)
        answer = mine.reserve(key, _info(), own, usd=amount, tokens=0, max_tokens=1)
        wrong += isinstance(answer, Held) != (spent + amount <= 450_000)
        if isinstance(answer, Held):
            cost = chance.randint(0, amount)
            mine.settle([{"step_id": key[0], "token": key[1], "ordinal": 1, "state": 1, "usd": cost, "tokens": 0}])
            spent += cost
    return wrong


# The naive way


_NAIVE = """
import random, sys, psycopg
url, seed, attempts, limit = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
chance = random.Random(seed)
with psycopg.connect(url, autocommit=True) as db:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(attempts):
        amount = chance.randint(1, 1000)
        if db.execute("SELECT spent FROM naive").fetchone()[0] + amount <= limit:
            db.execute("UPDATE naive SET spent = spent + %s", (chance.randint(0, amount),))
"""


def naive_reservations(admin: str, seed: int) -> list[Finding]:
    """Check, call, add: the result of the same harness."""
    limit = NAIVE_ATTEMPTS * 1000 // 8
    with _database(admin, "naive") as url:
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE naive (spent bigint NOT NULL)")
            connection.execute("INSERT INTO naive VALUES (0)")
        command = [sys.executable, "-c", _NAIVE, url]
        children = [
            subprocess.Popen(
                [*command, f"{seed}:{child}", str(NAIVE_ATTEMPTS // PROCESSES), str(limit)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for child in range(PROCESSES)
        ]
        for child in children:
            assert child.stdout is not None
            child.stdout.readline()
        for child in children:
            _go(child)
        for child in children:
            child.wait()
            assert child.stdout is not None
            child.stdout.close()
        with psycopg.connect(url) as connection:
            spent = connection.execute("SELECT spent FROM naive").fetchone()
    assert spent is not None
    over = max(0, spent[0] - limit)
    return [Finding("check then add, same harness: over", dollars(over), "> 0 (it can be seen)", over > 0)]


# Plans compared with runs


def plans_against_runs(turns: int, seed: int) -> list[Finding]:
    """Plan and run every bundled workflow `turns` times."""
    names = [entry.name for entry in catalogue.entries()]
    seen = forecast.measure(names, turns, seed)
    verdict = forecast.judge(seen)
    least = f">= {forecast.INSIDE:.0%}"
    return [
        Finding("plans of bundled workflows, runs of each", f"{len(names)}, {turns}"),
        Finding("  costs between low and p95", f"{verdict.cost:.1%}", least, verdict.cost >= forecast.INSIDE),
        Finding("  costs, tokens and times", f"{verdict.all:.1%}", least, verdict.all >= forecast.INSIDE),
        Finding("  figures above worst", f"{verdict.over}", "0", not verdict.over),
        Finding(
            "the same for plans that are halved",
            f"{verdict.control:.1%}",
            f"< {forecast.INSIDE:.0%} (it can be seen)",
            verdict.control < forecast.INSIDE,
        ),
    ]


# Runs on worker processes


def runs_at_once(admin: str) -> list[Finding]:
    """Submit 200 runs against a budget that fits 120.5 of them: with deny, with wait, and the naive way."""
    found: list[Finding] = []
    for way in ("deny", "wait"):
        with (
            _database(admin, f"runs_{way}") as url,
            redis_server() as redis_url,
            start_sandbox(latency="50ms") as sandbox,
            tempfile.TemporaryDirectory(prefix="gorgon-budget-") as folder,
            cluster(url, redis_url, sandbox, Path(folder)) as made,
        ):
            found += _way(made, sandbox, way)
    with (
        start_sandbox(latency="50ms") as sandbox,
        tempfile.TemporaryDirectory(prefix="gorgon-budget-") as folder,
    ):
        found.append(_naive_runs(Path(folder), sandbox))
    return found


def _way(made: Cluster, sandbox: Sandbox, way: str) -> list[Finding]:
    services = made.services
    for _ in range(WORKERS):
        made.worker("openai", "control", slots=SLOTS, wait=False)
    for process in made.processes:
        process.wait_ready()
    plan, _ = services.read(WORKFLOW % way)
    cost = _cost_of_one(made, plan)
    limit = int(cost * FITTING)
    before = cost  # the measured run is on the budget too
    services.set_budget("team:bench", period="month", usd=f"{(limit + before) / 1e6:.6f}")
    begun = time.monotonic()
    ids = [services.submit(plan, {"part": f"{number:03d}"}, target="sandbox").run_id for number in range(RUNS)]
    states = _ended(made, ids, way)
    seconds = time.monotonic() - begun
    succeeded = sum(state == "succeeded" for state in states.values())
    refused = [services.run(run)["error"] for run, state in states.items() if state == "failed"]
    told = sum(_tells(error) for error in refused)
    waiting = sum(state == "running" for state in states.values())
    for run, state in states.items():
        if state == "running":
            services.cancel(run)
    over, equal = money.over(services.budgets), money.replayed(services.budgets)
    paid, bill = money.paid(services), money.bill(sandbox)
    worst = max(over, paid - limit - before, 0)
    rest = f"{len(refused)} refused" if way == "deny" else f"{waiting} wait for the next month"
    return [
        Finding(f"{RUNS} runs, room for {FITTING}, {way}: complete", f"{succeeded}", "120", succeeded == 120),
        Finding("  the others", rest, f"{RUNS - 120}", (len(refused) if way == "deny" else waiting) == RUNS - 120),
        Finding("  over the budget, by accounts and by calls", dollars(worst), "0", worst == 0),
        Finding("  ledger replayed = balances", "yes" if equal else "NO", "yes", equal),
        Finding("  sum of the ledger − the sandbox's bill", dollars(paid - bill), "0", paid == bill),
        Finding("  seconds", f"{seconds:.1f}"),
        *([Finding("  refusals that say what is missing", f"{told} of {len(refused)}", "all", told == len(refused))]
          if way == "deny" else []),
    ]  # fmt: skip


def _cost_of_one(made: Cluster, plan: Any) -> int:
    run = made.services.submit(plan, {"part": "000"}, target="sandbox").run_id
    document = made.wait(run).document
    assert document["status"] == "succeeded", document
    return round(document["cost_usd"] * 1e6)


def _ended(made: Cluster, ids: Sequence[str], way: str) -> dict[str, str]:
    """Return the states of the runs when all have ended, or (with wait) when none can continue."""
    until = time.monotonic() + RUN_SECONDS
    states: dict[str, str] = {}
    while time.monotonic() < until:
        for run in ids:
            if states.get(run) not in FINISHED:
                states[run] = made.services.run(run)["status"]
        left = [run for run in ids if states[run] not in FINISHED]
        if not left or (way == "wait" and len(left) <= RUNS - 120 and _quiet(made)):
            break
        time.sleep(0.5)
    return states


def _quiet(made: Cluster) -> bool:
    """Return whether nothing is reserved and no step is about to try: all remaining steps wait for the next period."""
    with made.services.database.read() as connection:
        waits = connection.scalar(select(func.count()).select_from(budget_waits).where(
            budget_waits.c.patient))  # fmt: skip
    return waits == RUNS - 120 and not any(entry.usd_reserved for entry in made.services.budgets.balances().values())


def _tells(error: dict[str, Any]) -> bool:
    return (
        error["kind"] == "budget"
        and "the budget of team bench per month" in error["message"].lower()
        and "is left." in error["message"]
    )


class _Naive:
    """Check then add: sums up the ledger, and admits a call if it would fit."""

    def __init__(self, inner: Budgets, limit: int) -> None:
        self.inner = inner
        self.limit = limit

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def spent(self) -> int:
        with self.inner.database.read() as connection:
            return int(connection.scalar(select(func.coalesce(func.sum(ledger.c.cost_micro), 0))) or 0)

    def reserve(self, key: Any, info: Any, own: Any, *, usd: int, tokens: int, max_tokens: int) -> Held | Shortage:
        if self.spent() + usd <= self.limit:
            return Held(key, max_tokens, usd, tokens)
        (entry,) = self.inner.look(info, own)
        balance = replace(entry.balance, usd_limit=self.limit, usd_spent=self.spent(), usd_reserved=0)
        return replace(entry, balance=balance)


def _naive_runs(folder: Path, sandbox: Sandbox) -> Finding:
    """Run the same workflows with a naive budget in the engine's own port."""
    settings = Settings(
        _env_file=None,
        home=folder,
        database_url=f"sqlite:///{folder}/gorgon.db",
        broker_url=EMBEDDED_BROKER,
    )
    home = new_home()
    with (
        contextlib.closing(build(settings)) as services,
        embedded(
            services, queues=["openai"], slots=SLOTS, home=home, target="sandbox", sandbox_url=sandbox.url
        ) as runtime,
    ):
        lab = Lab(services, sandbox, home)
        plan, _ = lab.services.read(WORKFLOW % "deny")
        first = lab.wait(lab.services.submit(plan, {"part": "000"}, home=lab.home).run_id)
        cost = round(first.document["cost_usd"] * 1e6)
        limit = int(cost * (FITTING + 1))
        lab.services.set_budget("team:bench", period="month", usd="1000")
        naive = _Naive(lab.services.budgets, limit)
        runtime.executor.budgets = naive  # type: ignore[assignment]
        ids = [lab.services.submit(plan, {"part": f"{n:03d}"}, home=lab.home).run_id for n in range(RUNS)]
        for run in ids:
            lab.wait(run, within=RUN_SECONDS)
        over = max(0, naive.spent() - limit)
    return Finding(f"{RUNS} runs, check then add: over", dollars(over), "> 0 (it can be seen)", over > 0)


if __name__ == "__main__":
    sys.exit(main())
