"""The same random history on SQLite and on PostgreSQL, in one transaction each and at one clock that stands still.

A history is rolled back at its end, so that thousands of them need one database of each kind and no cleaning.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

from sqlalchemy import Connection, insert, select, text

from gorgon_common.engine.records import (
    Claimed,
    ReadyStep,
    step_id,
)
from gorgon_common.engine.states import RunStatus
from gorgon_common.persistence import budgets, budgets_sqlite
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.store import Store, Worker
from gorgon_common.persistence.tables import (
    backlog,
    blobs,
    budget_alerts,
    budget_periods,
    budget_waits,
    checkpoints,
    event_waits,
    events,
    expansions,
    fingerprints,
    held_steps,
    ledger,
    plans,
    postings,
    reservations,
    run_events,
    run_slots,
    runs,
    step_deaths,
    steps,
    workers,
)
from gorgon_common.scope import SYSTEM, Scope
from tests.support.engine import ANTHROPIC, CONTROL, OPENAI

START = datetime(2026, 5, 6, 7, 8, 9, 123456, tzinfo=UTC)
_CLOCK = (
    "CREATE SCHEMA IF NOT EXISTS frozen",
    (
        "CREATE OR REPLACE FUNCTION frozen.clock_timestamp() RETURNS timestamptz LANGUAGE sql STABLE"
        " AS $$ SELECT current_setting('frozen.now')::timestamptz $$"
    ),
)
QUEUES = (OPENAI, ANTHROPIC, CONTROL)
RUNS = (1, 2, 3)
PERIODS = ((1, 40), (2, 20), (3, 10), (4, 20))
"""(account, level); the last one's period is over."""
_COMPARED = {
    steps: (),
    runs: (),
    workers: (),
    checkpoints: ("finished_at",),  # the end of a cancelled step is told by the process's clock
    blobs: (),
    fingerprints: (),
    events: ("seq", "at"),
    ledger: ("at",),
    backlog: (),
    held_steps: (),
    run_slots: (),
    expansions: (),
    step_deaths: (),
    event_waits: (),
    run_events: ("id",),
    reservations: (),
    postings: ("seq",),
    budget_periods: (),
    budget_waits: (),
    budget_alerts: ("id",),
}
"""Each table with the columns that may differ."""
_QUERIES = {
    table: select(*[column for column in table.c if column.name not in skipped]) for table, skipped in _COMPARED.items()
}


class OneTransaction(Database):
    """A database whose transactions are all one, which is rolled back; its clock is `at`."""

    def __init__(self, url: str) -> None:
        super().__init__(url, pool_size=1)
        self.at = START
        self._joined: Connection | None = None
        if not self.sqlite:
            with super().write() as connection:
                for statement in _CLOCK:
                    connection.execute(text(statement))

    @contextlib.contextmanager
    def history(self) -> Iterator[Connection]:
        self.at = START
        with self.engine.connect() as connection:
            transaction = connection.begin()
            self._joined = connection
            try:
                if not self.sqlite:
                    connection.execute(text("SET LOCAL search_path = public, frozen, pg_catalog"))
                self.move(0)
                yield connection
            finally:
                self._joined = None
                transaction.rollback()

    def move(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)
        if not self.sqlite:
            driver = budgets.driver(self.joined)
            driver.execute("SELECT set_config('frozen.now', %s, true)", (self.at.isoformat(),))

    @property
    def joined(self) -> Connection:
        assert self._joined is not None
        return self._joined

    def now(self) -> datetime:
        return self.at

    @contextlib.contextmanager
    def write(self, scope: Scope = SYSTEM) -> Iterator[Connection]:
        self.joined.info["scope"] = scope
        yield self.joined

    read = statements = write


class Twin:
    """One of the two stores."""

    def __init__(self, url: str) -> None:
        self.database = OneTransaction(url)
        self.store = Store(self.database)

    @property
    def connection(self) -> Connection:
        return self.database.joined

    def exchange(self, asks: Sequence[Any], facts: Sequence[dict[str, Any]]) -> list[tuple[Any, ...]]:
        """Post facts and reserve, as `Budgets` does."""
        driver = budgets.driver(self.connection)
        if self.database.sqlite:
            budgets_sqlite.settle(driver, facts)
            return [budgets_sqlite.reserve(driver, *ask) for ask in asks]
        if not asks:
            driver.execute("SELECT gorgon_settle(%b::jsonb)", (json.dumps(facts),))
            return []
        body = budgets.asked(asks)
        return driver.execute(budgets.EXCHANGE, (json.dumps(facts) if facts else None, body, 0.0)).fetchall()

    def tables(self) -> dict[str, list[Any]]:
        return {
            table.name: sorted((plain(entry) for entry in self.connection.execute(query)), key=repr)
            for table, query in _QUERIES.items()
        }


def plain(value: Any) -> Any:
    """Return an answer in a form in which two can be compared: the order of steps in it says nothing."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__, *(plain(getattr(value, field.name)) for field in dataclasses.fields(value))
    if isinstance(value, Enum) or not isinstance(value, list | tuple):
        return value
    if value and isinstance(value, list) and all(isinstance(entry, ReadyStep | Claimed | int) for entry in value):
        return sorted((plain(entry) for entry in value), key=repr)
    return tuple(plain(entry) for entry in value)


class World:
    """Rows at the start of a history: three runs, four workers and their accounts."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.workers = [
            Worker(1, target="sandbox", home="", queues=[OPENAI, CONTROL]),
            Worker(2, target="sandbox", home="", queues=[ANTHROPIC, OPENAI]),
            Worker(3, target="sandbox", home="", queues=[OPENAI, ANTHROPIC]),
            Worker(4, target="sandbox", home="elsewhere", queues=[OPENAI, CONTROL]),
        ]
        self._entries: list[dict[str, Any]] = []
        self._steps = {run: self._rows(run) for run in RUNS}
        self._runs = [self._run(run) for run in RUNS]
        self._periods = [self._period(number, level) for number, level in PERIODS]
        self.sizes = {run: len(rows) for run, rows in self._steps.items()}
        self.gates = {run: size - 1 for run, size in self.sizes.items()}

    def enter(self, connection: Connection) -> None:
        """Insert the rows."""
        nodes = [{"kind": "agent", "spec": {"models": ["openai:gpt-5"]}} for _ in range(12)]
        limited = [{"run_id": run["id"], "holders": "[]"} for run in self._runs if run["max_parallel"] is not None]
        for table, values in (
            (plans, [{"hash": "p", "body": json.dumps({"nodes": nodes}), "created_at": START}]),
            (workers, [self._person(worker) for worker in self.workers]),
            (runs, self._runs),
            (run_slots, limited),
            (steps, [row for rows in self._steps.values() for row in rows]),
            (backlog, self._entries),
            (budget_periods, self._periods),
        ):
            if values:
                connection.execute(insert(table), values)

    def _person(self, worker: Worker) -> dict[str, Any]:
        return {
            "id": worker.owner,
            "name": "w",
            "target": worker.target,
            "home": worker.home,
            "slots": 4,
            "queues": ",".join(map(str, worker.queues)),
            "started_at": START,
            "beat_at": START,
            "reaped": False,
            "lease_until": START + timedelta(seconds=-1 if worker.owner == 3 else 60),
        }

    def _run(self, run: int) -> dict[str, Any]:
        return {
            "id": run,
            "public_id": f"run_{run}",
            "team": "t",
            "workflow": "w",
            "plan_hash": "p",
            "inputs": "{}",
            "target": "sandbox",
            "home": "elsewhere" if self.rng.random() < 0.1 else "",
            "root_id": run,
            "status": int(RunStatus.RUNNING),
            "active": self.rng.random() < 0.85,
            "cancelled": False,
            "next_row": len(self._steps[run]),
            "created_at": START,
            "max_parallel": self.rng.choice([1, 2]) if self.rng.random() < 0.3 else None,
        }

    def _period(self, number: int, level: int) -> dict[str, Any]:
        usd, tokens = self.rng.choice([None, 50, 100, 400]), self.rng.choice([None, 100, 1000])
        return {
            "id": number,
            "key": f"p{number}",
            "level": level,
            "label": f"limit {number}",
            "usd_limit": usd,
            "usd_wall": usd,
            "token_limit": tokens,
            "token_wall": tokens,
            "ends_at": START - timedelta(days=1) if number == PERIODS[-1][0] else None,
        }

    def _rows(self, run: int) -> list[dict[str, Any]]:
        """Return the steps of a random graph; the last one is the gate, and waits for all leaves."""
        rng = self.rng
        count = rng.randint(4, 8)
        deps: dict[int, list[int]] = {0: []}
        for number in range(1, count - 1):
            deps[number] = sorted(rng.sample(range(number), min(number, rng.choice([0, 0, 1, 1, 2]))))
        used = {dep for after in deps.values() for dep in after}
        deps[count - 1] = [number for number in range(count - 1) if number not in used]
        rows = []
        for number, before in deps.items():
            waits = not before and rng.random() < 0.3
            queue = rng.choice(QUEUES)
            key = step_id(run, number)
            if waits:
                self._entries.append({"queue": queue, "rank": rng.choice([-1, 0, 1, 2]), "step_id": key})
            rows.append(
                {
                    "id": key,
                    "due": None if before or waits else START + timedelta(seconds=5),
                    "token": 0,
                    "node": number,
                    "deps_left": len(before),
                    "status": 0 if before else 1,
                    "attempt": 1,
                    "crashes": rng.choice([0] * 8 + [1, 2, 3]),
                    "weight": 0 if number == count - 1 else rng.choice([0, 1, 2, 2, 2]),
                    "queue": queue,
                    "grouped": rng.random() < 0.1,
                    "carried": rng.random() < 0.1,
                    "successors": [other for other, after in deps.items() if number in after],
                }
            )
        return rows
