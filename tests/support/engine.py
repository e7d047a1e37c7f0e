"""Plans, rows and stores for tests of the engine: real databases, with a clock that the tests advance."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import count
from typing import Any

from sqlalchemy import inspect, select, text

from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine import rows
from gorgon_common.engine.records import (
    ClaimCapacity,
    Claimed,
    Finish,
    NewRun,
    Result,
    Row,
    TransitionResult,
    Weight,
    step_id,
)
from gorgon_common.engine.states import RUN_TRANSITIONS, STEP_TRANSITIONS, RunStatus, StepStatus
from gorgon_common.persistence import predicates
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.store import Store, Worker
from gorgon_common.persistence.tables import backlog, events, ledger, runs, steps
from gorgon_common.workflow.plan import Dep, Join, Kind, Node, Plan

NOTHING = ClaimCapacity(0, 0, 0)
"""A worker that takes over no steps."""
OPENAI, ANTHROPIC, CONTROL = rows.QUEUE_NUMBERS["openai"], rows.QUEUE_NUMBERS["anthropic"], rows.CONTROL
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
_numbers = count(1)


# Plans


def node(name: str, *after: int, kind: Kind = Kind.NOOP, queue: str | None = "openai", **fields: Any) -> Node:
    """Return a step that depends on others by number; inline kinds have no queue."""
    deps = tuple(Dep(number) for number in after)
    inline = kind not in (Kind.NOOP, Kind.AGENT, Kind.COMMAND, Kind.ACTION)
    return Node(id=name, kind=kind, queue=None if inline else queue, deps=deps, **fields)


def plan_of(*top: Node, templates: Sequence[Node] = (), **fields: Any) -> Plan:
    """Return a plan of top-level steps, followed by the engine's own three, then the templates.

    Steps of phase `on_error` and `finally` come after those of `main`.
    """
    sizes = {phase: sum(entry.phase == phase for entry in top) for phase in ("main", "on_error", "finally")}
    assert sum(sizes.values()) == len(top)
    used = {dep.node for entry in top for dep in entry.deps}
    gate = len(top)
    leaves = [number for number, entry in enumerate(top) if entry.phase == "main" and number not in used]
    late = [
        replace(entry, deps=entry.deps or (Dep(gate if entry.phase == "on_error" else gate + 1),), join=Join.ALL_DONE)
        if entry.phase != "main"
        else entry
        for entry in top
    ]

    def ends(phase: str, otherwise: int) -> tuple[Dep, ...]:
        found = tuple(Dep(number) for number, entry in enumerate(top) if entry.phase == phase and number not in used)
        return found or (Dep(otherwise),)

    own = (
        Node("$gate", Kind.GATE, deps=tuple(Dep(number) for number in leaves), join=Join.ALL_DONE),
        Node("$finally", Kind.FINALLY, deps=ends("on_error", gate), join=Join.ALL_DONE),
        Node("$end", Kind.END, deps=ends("finally", gate + 1), join=Join.ALL_DONE),
    )
    return Plan(name="test", nodes=(*late, *own, *templates), top=len(top) + 3, **fields)


def agent(name: str, *after: int, **fields: Any) -> Node:
    """Return a slow step."""
    return node(name, *after, kind=Kind.AGENT, **fields)


# Stores


def open_store(url: str) -> Store:
    """Return a store whose database rejects every transition that is not in the tables of `states`."""
    store = Store(Database(url, pool_size=4))
    guard(store.database)
    return store


def guard(database: Database) -> None:
    """Let the database check every change of a status against STEP_TRANSITIONS and RUN_TRANSITIONS."""
    tables: list[tuple[str, Mapping[Any, Any]]] = [("steps", STEP_TRANSITIONS), ("runs", RUN_TRANSITIONS)]
    with database.write() as connection:
        for table, allowed in tables:
            pairs = " OR ".join(
                f"(OLD.status = {int(before)} AND NEW.status = {int(after)})"
                for before, afters in allowed.items()
                for after in sorted(afters)
            )
            when = f"OLD.status <> NEW.status AND NOT ({pairs})"
            if database.sqlite:
                connection.execute(
                    text(
                        f"CREATE TRIGGER IF NOT EXISTS guard_{table} BEFORE UPDATE OF status ON {table} WHEN {when}"
                        f" BEGIN SELECT RAISE(ABORT, 'no such transition of {table}'); END"
                    )
                )
                continue
            connection.execute(
                text(
                    f"CREATE OR REPLACE FUNCTION guard_{table}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
                    f" RAISE EXCEPTION 'no such transition of {table}: % to %', OLD.status, NEW.status; END $$"
                )
            )
            connection.execute(
                text(
                    f"CREATE OR REPLACE TRIGGER guard_{table} BEFORE UPDATE OF status ON {table}"
                    f" FOR EACH ROW WHEN ({when}) EXECUTE FUNCTION guard_{table}()"
                )
            )


def empty(store: Store, *, but: Collection[str] = ()) -> None:
    """Delete every row, for the next test on the same database."""
    with store.database.write() as connection:
        for name in inspect(connection).get_table_names():
            if name != "alembic_version" and name not in but:
                connection.execute(text(f'DELETE FROM "{name}"'))


def elapse(store: Store, seconds: float) -> None:
    """Let time pass for the database, without sleeping."""
    if store.database.sqlite:
        store.database.clock_offset += seconds
        return
    columns = [
        ("steps", "due"),
        ("workers", "started_at"),
        ("workers", "beat_at"),
        ("workers", "lease_until"),
        ("step_deaths", "at"),
        ("leaders", "until"),
        ("runs", "deadline"),
    ]
    with store.database.write() as connection:
        for table, column in columns:
            connection.execute(
                text(f"UPDATE {table} SET {column} = {column} - make_interval(secs => :s)"), {"s": seconds}
            )


def now(store: Store) -> datetime:
    """Return the time by the database's clock."""
    with store.database.read() as connection:
        return predicates.now(connection)


def new_run(**fields: Any) -> NewRun:
    """Return a run that has not been created yet."""
    number = next(_numbers)
    values: dict[str, Any] = {
        "public_id": f"run_{number}",
        "workflow": "test",
        "plan_hash": f"{number:064d}",
        "plan_body": "{}",
        "inputs": {},
        "target": "sandbox",
        "created_at": NOW,
    }
    return NewRun(**{**values, **fields})


def row(
    number: int,
    *successors: int,
    deps: int = 0,
    weight: Weight = Weight.SLOW,
    queue: int = OPENAI,
    **fields: Any,
) -> Row:
    """Return a row for a new run; its node has the same number."""
    return Row(number, number, deps, successors, weight, queue, **fields)


def fan(width: int, **fields: Any) -> list[Row]:
    """Return rows of a diamond: 0 → 1 … width → width + 1."""
    inner = [row(number, width + 1, deps=1, **fields) for number in range(1, width + 1)]
    return [row(0, *range(1, width + 1)), *inner, row(width + 1, deps=width)]


def paid(ordinal: int = 1, **fields: Any) -> CallRecord:
    """Return a call to a model that has a cost."""
    values: dict[str, Any] = {
        "provider": "openai",
        "model": "gpt-test",
        "role": "builder",
        "ordinal": ordinal,
        "usage": Usage(input_tokens=7, output_tokens=3),
        "cost_micro": 42,
        "price_version": "1",
        "latency_ms": 5,
        "outcome": "ok",
    }
    return CallRecord(**{**values, **fields})


@dataclass
class Desk:
    """A store with one registered worker, and short methods for common operations of tests."""

    store: Store
    worker: Worker = field(init=False)
    queues: Sequence[int] = (OPENAI, CONTROL)
    home: str = ""
    target: str = "sandbox"
    lease: float = 60.0

    def __post_init__(self) -> None:
        self.worker = self.register()

    def register(self, **fields: Any) -> Worker:
        values: dict[str, Any] = {
            "target": self.target,
            "home": self.home,
            "queues": list(self.queues),
            "slots": 4,
            "lease": self.lease,
        }
        return self.store.register("test", **{**values, **fields})

    def create(self, rows_: Sequence[Row], **fields: Any) -> int:
        """Create a run that workers already know."""
        run, _ = self.store.create(new_run(**{"home": self.home, "target": self.target, **fields}), rows_)
        self.store.begin(run)
        return run

    def claim(self, run: int, *numbers: int, worker: Worker | None = None, **fields: Any) -> list[Claimed]:
        ids = [step_id(run, number) for number in numbers]
        mine = self.store.claim_and_finish(worker or self.worker, NOTHING, claims=ids, **fields).mine
        return sorted(mine, key=lambda step: ids.index(step.id))

    def one(self, run: int, number: int, **fields: Any) -> Claimed:
        (step,) = self.claim(run, number, **fields)
        return step

    def end(
        self,
        *held: Claimed,
        status: StepStatus = StepStatus.SUCCEEDED,
        keep: ClaimCapacity = NOTHING,
        skipped: Mapping[int, str] | None = None,
        worker: Worker | None = None,
        **result: Any,
    ) -> TransitionResult:
        values = {"started_at": NOW, "finished_at": NOW, **result}
        finishes = [Finish(step, Result(status, **values), skipped or {}) for step in held]
        return self.store.claim_and_finish(worker or self.worker, keep, finishes=finishes)

    def take_all(self, run: int) -> int:
        """Claim and finish ready steps until there are none; returns their number."""
        done = 0
        while ready := [number for number, status in self.statuses(run).items() if status is StepStatus.READY]:
            held = self.claim(run, *ready)
            assert held
            self.end(*held)
            done += len(held)
        return done

    # Queries

    def all(self, table: Any, *where: Any) -> list[Any]:
        with self.store.database.read() as connection:
            return list(connection.execute(select(table).where(*where)).all())

    def step(self, run: int, number: int) -> Any:
        (found,) = self.all(steps, steps.c.id == step_id(run, number))
        return found

    def status(self, run: int, number: int) -> StepStatus:
        return StepStatus(self.step(run, number).status)

    def statuses(self, run: int) -> dict[int, StepStatus]:
        found = self.all(steps, steps.c.id >= step_id(run, 0), steps.c.id < step_id(run + 1, 0))
        return {entry.id & 0xFFFFF: StepStatus(entry.status) for entry in sorted(found, key=lambda entry: entry.id)}

    def run(self, run: int) -> Any:
        (found,) = self.all(runs, runs.c.id == run)
        return found

    def run_status(self, run: int) -> RunStatus:
        return RunStatus(self.run(run).status)

    def checkpoint(self, run: int, number: int) -> Any:
        return self.store.checkpoints([step_id(run, number)]).get(step_id(run, number))

    def kinds(self, run: int) -> list[str]:
        return [entry.kind for entry in sorted(self.all(events, events.c.run_id == run), key=lambda entry: entry.seq)]

    def spent(self) -> list[Any]:
        return self.all(ledger)

    def waiting(self) -> list[Any]:
        return sorted(self.all(backlog), key=lambda entry: (entry.queue, entry.rank, entry.step_id))


def rows_of(ids: Sequence[Any]) -> list[int]:
    """Return the rows of steps or heads."""
    return [entry.id & 0xFFFFF for entry in ids]


def make_run(store: Store, plan: Plan, *, grouped: frozenset[int] = frozenset(), **fields: Any) -> int:
    """Create a run of a plan; its first steps are ready."""
    new = new_run(plan_hash=plan.hash(), plan_body=plan.to_json(), workflow=plan.name, **fields)
    return store.create(new, rows.top_rows(plan, plan.successors(), grouped))[0]
