"""The engine's store: every change to a run's state is one transaction in this module.

The hot path (`claim_and_finish`) has one implementation per database.  Everything else is SQLAlchemy statements that
run on both databases.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import psycopg
from sqlalchemy import Connection, and_, func, insert, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common import strict_json, telemetry
from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.poison import POISON_DEATHS
from gorgon_common.engine.records import (
    ROW_MASK,
    Activity,
    BudgetRequest,
    Buried,
    Checkpoint,
    Children,
    ClaimCapacity,
    Claimed,
    ClaimResult,
    Event,
    Expansion,
    Finish,
    KeyDecision,
    KeyState,
    NewRun,
    ReadyStep,
    Recovered,
    Refusal,
    Released,
    Renewal,
    Result,
    Row,
    RunClosed,
    RunInfo,
    TransitionResult,
    Waiting,
    Weight,
    step_id,
)
from gorgon_common.engine.states import FINISHED_RUN, RunStatus, StepStatus
from gorgon_common.errors import Conflict, NotFound, Unavailable
from gorgon_common.persistence import (
    backlog,
    cancellation,
    claim_and_finish_sqlite,
    concurrency,
    deaths,
    encoding,
    lost_calls,
    max_parallel,
    postgres,
    recovery,
    settling,
    waits,
)
from gorgon_common.persistence.activity import activity, leads_for
from gorgon_common.persistence.database import Database, scope_of
from gorgon_common.persistence.journal import tell
from gorgon_common.persistence.predicates import LOST_SECONDS, chunks, is_live, live_steps, now, orphaned
from gorgon_common.persistence.tables import (
    SQLITE_TIME,
    blobs,
    checkpoints,
    db_now,
    expansions,
    fingerprints,
    plans,
    runs,
    steps,
    workers,
)
from gorgon_common.scope import Scope

_ENDED_AS = {
    RunStatus.SUCCEEDED: "succeeded",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELLED: "been cancelled",
}
_TICK = (
    "SELECT * FROM gorgon_claim_and_finish(%b, %b, %b, %b::smallint[], %b::interval, %b::int, %b::int, %b::int, %b,"
    " %b::bigint[], %b::jsonb, %b::jsonb, %b::jsonb)"
)
# Budgets are settled in the same transaction, before the steps: the lock order is budget rows, then step rows.
_SETTLE_AND_TICK = (
    "SELECT t.* FROM (SELECT gorgon_settle(%b::jsonb) AS zero OFFSET 0) s, LATERAL gorgon_claim_and_finish(%b, %b, %b,"
    " %b::smallint[], %b::interval, %b::int + s.zero, %b::int, %b::int, %b, %b::bigint[], %b::jsonb, %b::jsonb,"
    " %b::jsonb) t"
)
# With array and JSON parameters, custom plans bring no benefit and are expensive to make.  A generic plan made while
# `steps` is small is kept, and must still look rows up by key once the table is large.  The cost settings therefore
# make a scan of the whole index look expensive.
_HOT_OPTIONS = (
    "-c plan_cache_mode=force_generic_plan -c enable_hashjoin=off -c enable_mergejoin=off -c enable_seqscan=off"
    " -c enable_bitmapscan=off -c cpu_index_tuple_cost=1 -c jit=off"
)
_RETRIED = (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)
_TRIES = 5
Given = ParamSpec("Given")
Got = TypeVar("Got")


def _tried_again(method: Callable[Concatenate[Store, Given], Got]) -> Callable[Concatenate[Store, Given], Got]:
    """Retry a transaction that PostgreSQL rolled back because of a deadlock or a serialization failure.

    Deadlocks can happen: a child that ends locks itself and then its composite, while stopping a run locks rows in
    ascending order.
    """

    @functools.wraps(method)
    def call(self: Store, /, *args: Given.args, **kwargs: Given.kwargs) -> Got:
        for _ in range(_TRIES - 1):
            try:
                return method(self, *args, **kwargs)
            except Unavailable as error:
                if not isinstance(getattr(error.__cause__, "orig", error.__cause__), _RETRIED):
                    raise
        return method(self, *args, **kwargs)

    return call


class Worker:
    """A registered worker, which claims steps."""

    def __init__(self, owner: int, *, target: str, home: str, queues: Sequence[int]) -> None:
        self.owner = owner
        self.target = target
        self.home = home
        self.queues = list(queues)


class Store:
    """Rows of runs and steps.  Thread-safe.

    `poison_deaths`: the number of worker deaths that condemns a step, unless chance explains them.
    """

    def __init__(self, database: Database, *, poison_deaths: int = POISON_DEATHS) -> None:
        self.database = database
        self.poison_deaths = poison_deaths
        self._hot: postgres.Connection | None = None
        self._hot_lock = threading.Lock()

    def close(self) -> None:
        """Close the connections."""
        with self._hot_lock:
            if self._hot is not None:
                self._hot.close()
                self._hot = None
        self.database.close()

    # Workers

    def register(self, name: str, *, target: str, home: str, queues: Sequence[int], slots: int, lease: float) -> Worker:
        """Register a worker process; its lease lasts `lease` seconds."""
        row = insert(workers).values(
            name=name,
            target=target,
            home=home,
            queues=",".join(map(str, queues)),
            slots=slots,
            started_at=db_now(),
            lease_until=db_now(lease),
            beat_at=db_now(),
            reaped=False,
        )
        with self.database.write() as connection:
            owner = connection.execute(row.returning(workers.c.id)).scalar_one()
        return Worker(owner, target=target, home=home, queues=queues)

    def heartbeat(self, worker: Worker, lease: float, watermarks: Mapping[int, float]) -> Renewal:
        """Renew the lease, so that the worker may claim steps.

        A worker keeps its id even if its lease had expired.  Steps it still holds remain its own; steps that were
        taken from it have a new token.

        `watermarks`: queue → send time of the newest message that this worker has claimed.
        """
        beat = (
            update(workers)
            .where(workers.c.id == worker.owner)
            .values(lease_until=db_now(lease), beat_at=db_now(), watermarks=encoding.dump(dict(watermarks)))
        )
        with self.database.write() as connection:
            if connection.execute(beat.where(workers.c.reaped.is_(False))).rowcount == 1:
                return Renewal.RENEWED
            revived = connection.execute(beat.values(reaped=False)).rowcount == 1
        return Renewal.REVIVED if revived else Renewal.UNKNOWN

    def watermarks(self, *, home: str, target: str | None = None) -> dict[int, float]:
        """Return queue → send time of the newest message that any worker has claimed (seconds since 1970)."""
        query = select(workers.c.watermarks).where(
            workers.c.home == home,
            workers.c.watermarks.is_not(None),
            *([] if target is None else [workers.c.target == target]),
        )
        found: dict[int, float] = {}
        with self.database.read() as connection:
            for marks in connection.scalars(query.order_by(workers.c.id.desc()).limit(500)):
                for queue, mark in json.loads(marks).items():
                    found[int(queue)] = max(found.get(int(queue), 0.0), mark)
        return found

    def retire(self, worker: Worker) -> None:
        """End a worker's lease now, so that the steps it still holds are taken over immediately."""
        over = update(workers).where(workers.c.id == worker.owner).values(lease_until=db_now(-1), retired=True)
        with self.database.write() as connection:
            connection.execute(over)

    def vacate(self, home: str) -> None:
        """End the leases of a home whose process is known to be dead, so that its runs can be resumed immediately."""
        with self.database.write() as connection:
            connection.execute(
                update(workers)
                .where(workers.c.home == home, workers.c.lease_until > db_now())
                .values(lease_until=db_now(-1))
            )

    def cancelled(self, run_ids: Iterable[int]) -> set[int]:
        """Return those of the runs that were cancelled on request, or that were stopped because their deadline passed.

        A run that is past its deadline but has not been stopped yet is not included: if its calls were aborted now, the
        steps after them would start.
        """
        wanted = list(run_ids)
        if not wanted:
            return set()
        late = and_(runs.c.deadline < db_now(), runs.c.status == int(RunStatus.FINISHING))
        with self.database.read() as connection:
            return set(connection.scalars(select(runs.c.id).where(runs.c.id.in_(wanted), or_(runs.c.cancelled, late))))

    def slots(self, target: str, home: str) -> dict[int, int]:
        """Return queue → total slots of the live workers that serve it."""
        query = select(workers.c.queues, workers.c.slots).where(
            workers.c.target == target, workers.c.home == home, workers.c.lease_until > db_now()
        )
        found: dict[int, int] = {}
        with self.database.read() as connection:
            for queues, slots in connection.execute(query):
                for queue in queues.split(","):
                    found[int(queue)] = found.get(int(queue), 0) + slots
        return found

    # Runs

    def create(self, new: NewRun, rows: Sequence[Row], *, scope: Scope | None = None) -> tuple[int, bool]:
        """Insert a run with its steps; steps without dependencies are ready.

        `scope`: the organisation that the run is for, and who asked for it; without it, the organisation of `new`.

        If the run has to wait for its concurrency key, none of its steps can be claimed until the run holds the key;
        see `admission`.  Returns (id, True), or (id of the run that has this idempotency key, False).  Raises Conflict
        if that run was a different request, and KeyTaken if the run may not wait.
        """
        scope = scope or Scope(org=new.org)
        new = replace(new, org=scope.org)
        with self.database.write(scope) as connection:
            if new.idempotency_key is not None:
                known = self._known(connection, new)
                if known is not None:
                    return known, False
            dialect = sqlite if self.database.sqlite else postgresql
            connection.execute(
                dialect.insert(plans)
                .values(hash=new.plan_hash, org_id=new.org, body=new.plan_body, created_at=new.created_at)
                .on_conflict_do_nothing(index_elements=["org_id", "hash"])
            )
            key, place = None, concurrency.Place.HOLDS
            if new.hold is not None:
                key = concurrency.lock(connection, new, new.hold)
                # The transaction that held the lock on the key until now may have created this very run.
                known = self._known(connection, new) if new.idempotency_key is not None else None
                if known is not None:
                    return known, False
                place = concurrency.enter(connection, key, new, new.hold)
            holds = place is concurrency.Place.HOLDS
            values = {
                "org_id": new.org,
                "public_id": new.public_id,
                "team": new.team,
                "workflow": new.workflow,
                "plan_hash": new.plan_hash,
                "inputs": encoding.dump(dict(new.inputs)),
                "target": new.target,
                "home": new.home,
                "root_id": new.root or 0,
                "resumed_from": new.resumed_from,
                "status": int(RunStatus.QUEUED),
                "active": holds,
                "cancelled": False,
                "next_row": len(rows),
                "idempotency_key": new.idempotency_key,
                "request_hash": new.request_hash,
                "created_at": new.created_at,
                "deadline": None if new.timeout is None or not holds else db_now(new.timeout),
                "key_id": key,
                "key_at": db_now() if key is not None and holds else None,
                "max_parallel": new.max_parallel,
                "trace_id": new.trace_id,
                "actor": scope_of(connection).actor[:200],
            }
            dialect = sqlite if self.database.sqlite else postgresql
            # Two concurrent requests with the same key may both pass the check above; the unique constraint admits only
            # one.
            inserted = connection.execute(
                dialect.insert(runs)
                .values(values)
                .on_conflict_do_nothing(index_elements=["org_id", "idempotency_key"])
                .returning(runs.c.id)
            ).scalar_one_or_none()
            if inserted is None:
                return cast(int, self._known(connection, new)), False
            run = int(inserted)
            if new.root is None:
                connection.execute(update(runs).where(runs.c.id == run).values(root_id=run))
            self._insert_rows(connection, run, rows, offset=0)
            if new.max_parallel is not None:
                max_parallel.open_slots(connection, run)
            if key is not None and new.hold is not None:
                concurrency.settle_in(connection, run, key, place, new.hold, new.timeout)
            waits = None if holds else "the run waits for its concurrency key"
            tell(connection, run, None, "run.resumed" if new.resumed_from else "run.queued", waits)
        return run, True

    # Concurrency keys

    def admission(self, run: int) -> KeyDecision:
        """Return whether a run holds its concurrency key, and which runs have to be cancelled before it can."""
        with self.database.read() as connection:
            return concurrency.admission(connection, run)

    def turns(self, *, home: str, target: str) -> list[KeyState]:
        """Return the pending work for the concurrency keys that runs of a home hold or wait for."""
        with self.database.read() as connection:
            return concurrency.turns(connection, home=home, target=target)

    @_tried_again
    def take_turn(self, key: int, *, home: str) -> list[ReadyStep]:
        """Hand a key to the runs whose turn it is; return first steps of those in `home`; they are owed messages."""
        with self.database.write() as connection:
            return concurrency.take_turn(connection, key, home=home, lost=LOST_SECONDS)

    @staticmethod
    def _known(connection: Connection, new: NewRun) -> int | None:
        row = connection.execute(
            select(runs.c.id, runs.c.request_hash).where(
                runs.c.org_id == new.org, runs.c.idempotency_key == new.idempotency_key
            )
        ).first()
        if row is None:
            return None
        if row.request_hash != new.request_hash:
            raise Conflict(
                f"The idempotency key {new.idempotency_key!r} was used for another request.",
                hint="Use a new key for each different run.",
            )
        return int(row.id)

    def _insert_rows(self, connection: Connection, run: int, rows: Sequence[Row], *, offset: int) -> None:
        """Insert rows in bulk; `row` and `successors` are relative to `offset`."""
        if not rows:
            return
        due = now(connection) + timedelta(seconds=LOST_SECONDS)
        driver = cast(Any, connection.connection.driver_connection)
        if self.database.sqlite:
            text = due.strftime(SQLITE_TIME)
            driver.executemany(
                "INSERT INTO steps (id, due, token, node, deps_left, status, attempt, crashes, weight, queue, grouped,"
                " carried, parent, position, successors) VALUES (?, ?, 0, ?, ?, ?, 1, 0, ?, ?, ?, 0, ?, ?, ?)",
                [
                    (
                        step_id(run, offset + row.row),
                        None if row.deps_left else text,
                        row.node,
                        row.deps_left,
                        _initial(row),
                        int(row.weight),
                        row.queue,
                        row.grouped,
                        row.parent,
                        row.position,
                        json.dumps([offset + successor for successor in row.successors]),
                    )
                    for row in rows
                ],
            )
            return
        stamp = due.isoformat()
        lines = [
            f"{step_id(run, offset + row.row)}\t{_null(None if row.deps_left else stamp)}\t0\t"
            f"{row.node}\t{row.deps_left}\t{_initial(row)}\t1\t0\t{int(row.weight)}\t{row.queue}\t"
            f"{'t' if row.grouped else 'f'}\tf\t{_null(row.parent)}\t{_null(row.position)}\t"
            f"{{{','.join(str(offset + successor) for successor in row.successors)}}}\n"
            for row in rows
        ]
        with driver.cursor().copy(
            "COPY steps (id, due, token, node, deps_left, status, attempt, crashes, weight, queue, grouped, carried,"
            " parent, position, successors) FROM STDIN"
        ) as copy:
            copy.write("".join(lines))

    def info(self, run: int) -> RunInfo:
        """Return what workers need to know about a run.  Raises NotFound."""
        with self.database.read() as connection:
            row = connection.execute(select(runs).where(runs.c.id == run)).first()
        if row is None:
            raise NotFound(f"There is no run number {run}.")
        return RunInfo(
            id=run,
            public_id=row.public_id,
            org=row.org_id,
            team=row.team,
            workflow=row.workflow,
            plan_hash=row.plan_hash,
            inputs=strict_json.loads_stored(row.inputs),
            target=row.target,
            home=row.home,
            root=row.root_id,
            created_at=row.created_at,
            key_at=row.key_at,
            trace_id=row.trace_id,
        )

    def begin(self, run: int) -> None:
        """Mark a queued run as running, because a worker has claimed one of its steps."""
        with self.database.write() as connection:
            started = connection.execute(
                update(runs)
                .where(runs.c.id == run, runs.c.status == int(RunStatus.QUEUED), runs.c.active)
                .values(status=int(RunStatus.RUNNING), started_at=db_now())
            )
            if started.rowcount:
                tell(connection, run, None, "run.started", None)

    def plan_body(self, plan_hash: str) -> str:
        """Return a stored plan's JSON.  Raises NotFound."""
        with self.database.read() as connection:
            # Plans with the same hash are the same, whichever organisation's they are.
            body = connection.scalar(select(plans.c.body).where(plans.c.hash == plan_hash).limit(1))
        if body is None:
            raise NotFound(f"There is no plan {plan_hash}.")
        return cast(str, body)

    def failure(self, run: int) -> tuple[dict[str, Any] | None, bool]:
        """Return the error of the step that failed the run, and whether the run was cancelled."""
        with self.database.read() as connection:
            row = connection.execute(select(runs.c.error, runs.c.cancelled).where(runs.c.id == run)).one()
        return (strict_json.loads_stored(row.error) if row.error else None), bool(row.cancelled)

    # The hot path

    def claim_and_finish(
        self,
        worker: Worker,
        keep: ClaimCapacity,
        *,
        claims: Sequence[int] = (),
        finishes: Sequence[Finish] = (),
        suspects: bool = False,
    ) -> TransitionResult:
        """Claim and finish steps in one transaction.

        Steps that become ready are taken over as far as `keep` allows; the others are reported.  A finish with
        `skipped` rows must come alone.  Raises Unavailable; in that case nothing was changed.
        """
        if self.database.sqlite:
            with self.database.write() as connection:
                return self._claim_and_finish(
                    connection, worker, keep, claims=claims, finishes=finishes, suspects=suspects
                )
        arguments = self._arguments(worker, keep, claims=claims, finishes=finishes, suspects=suspects)
        statement = _TICK
        settled = _settlements(finishes)
        if settled:
            statement, arguments = _SETTLE_AND_TICK, (json.dumps(settled), *arguments)
        doubtful = False
        with self._hot_lock:
            for attempt in range(_TRIES):
                try:
                    if self._hot is None or self._hot.closed:
                        self._hot = self._connect()
                    self._hot.ping()
                    rows = self._hot.execute(statement, arguments, prepare=True, binary=True).fetchall()
                    advance = _advance(rows)
                    advance.doubtful = doubtful
                    return advance
                except _RETRIED:
                    continue
                except psycopg.OperationalError as error:
                    hot, self._hot = self._hot, None
                    if hot is not None:
                        hot.close()
                    doubtful = True
                    if attempt:
                        raise Unavailable(f"The database cannot be used: {error}") from error
        raise Unavailable("The database refused a transaction five times in a row (deadlock).")

    def _connect(self) -> postgres.Connection:
        return self.database.connect(options=_HOT_OPTIONS)

    def _arguments(
        self,
        worker: Worker,
        keep: ClaimCapacity,
        *,
        claims: Sequence[int] = (),
        finishes: Sequence[Finish] = (),
        suspects: bool = False,
    ) -> tuple[Any, ...]:
        said, facts, skips = _encoded(finishes)
        return (
            worker.owner,
            worker.target,
            worker.home,
            worker.queues,
            f"{LOST_SECONDS} seconds",
            keep.fast,
            keep.slow,
            keep.pull,
            suspects,
            list(claims) or None,
            json.dumps(said, default=_iso) if said else None,
            json.dumps(facts, default=_iso) if facts else None,
            json.dumps(skips) if skips else None,
        )

    def _claim_and_finish(
        self,
        connection: Connection,
        worker: Worker,
        keep: ClaimCapacity,
        *,
        claims: Sequence[int] = (),
        finishes: Sequence[Finish] = (),
        suspects: bool = False,
    ) -> TransitionResult:
        """Do the same as `claim_and_finish`, inside a transaction that does more."""
        settling.settle(connection, _settlements(finishes))
        driver = cast(Any, connection.connection.driver_connection)
        if self.database.sqlite:
            said, facts, skips = _encoded(finishes)
            who = claim_and_finish_sqlite.Who(worker.owner, worker.target, worker.home, worker.queues, LOST_SECONDS)
            rows = claim_and_finish_sqlite.claim_and_finish(
                driver, who, keep, suspects=suspects, claims=claims, finishes=said, calls=facts, skips=skips
            )
        else:
            arguments = self._arguments(worker, keep, claims=claims, finishes=finishes, suspects=suspects)
            rows = driver.execute(_TICK, arguments, binary=True).fetchall()
        return _advance(rows)

    @_tried_again
    def claim_limited(
        self,
        worker: Worker | None,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> ClaimResult:
        """Claim slow steps of a run with `max_parallel` while it has room: `ids` and waiting steps; see `parallel`."""
        with self.database.write() as connection:
            return max_parallel.claim_limited(
                connection, worker, run, ids, follows=follows, free=free, suspects=suspects, lost=LOST_SECONDS
            )

    def held_runs(self, *, home: str, target: str) -> list[int]:
        """Return the runs with `max_parallel` that have waiting steps."""
        with self.database.read() as connection:
            return max_parallel.waiting_runs(connection, home=home, target=target)

    # Other transitions of a claimed step

    def owned(self, worker: Worker) -> list[Claimed]:
        """Return the steps that a worker holds.  Reads every step of the live runs of its home."""
        columns: list[Any] = [steps.c[entry.name] for entry in fields(Claimed)]
        query = (
            select(*columns)
            .select_from(live_steps())
            .where(is_live(worker.home), steps.c.status == int(StepStatus.RUNNING), steps.c.owner == worker.owner)
        )
        with self.database.read() as connection:
            return [Claimed(*row) for row in connection.execute(query)]

    def release(
        self, step: Claimed, *, weight: Weight | None = None, crashed: str | None = None
    ) -> Released | Buried | Refusal:
        """Give a claimed step back: it becomes ready again, or is cancelled if its run stopped while it was running.

        `weight`: the step's weight from now on.  Once its condition holds, a step belongs to its own queue.  `crashed`:
        what broke while the step ran; it counts like the death of its worker.
        """
        back = (
            update(steps)
            .where(_held(step))
            .values(
                status=int(StepStatus.READY),
                owner=None,
                due=db_now(LOST_SECONDS),
                weight=step.weight if weight is None else int(weight),
            )
            .returning(
                steps.c.id,
                steps.c.node,
                steps.c.weight,
                steps.c.queue,
                steps.c.crashes,
                steps.c.token,
                steps.c.halted,
            )
        )
        with self.database.write() as connection:
            if step.weight == Weight.SLOW:  # only slow steps reserve anything
                if crashed is not None:
                    lost_calls.enter(connection, [step])
                settling.abandon(connection, [step.id], token=step.token)
            found = connection.execute(back).first()
            if found is None:
                return Refusal.LOST
            if found.halted:
                return Buried(self._buried(connection, found))
            head = ReadyStep(*found[:5])
            if crashed is not None:
                seen = deaths.enter_broken(connection, step.id, step.token, crashed, limit=self.poison_deaths)
                connection.execute(update(steps).where(steps.c.id == step.id).values(crashes=seen))
                head = replace(head, crashes=seen)
        return Released(head)

    def park(
        self,
        step: Claimed,
        *,
        seconds: float,
        reason: str,
        message: str,
        calls: Sequence[CallRecord],
        attempt: bool,
        room: BudgetRequest | None = None,
        event: str | None = None,
    ) -> Waiting | Refusal:
        """Let a claimed step wait.  `attempt`: whether this counts as an attempt.

        `reason`: one of `outcomes.REASONS`, for machines; `message` is for people.  `room`: the step is woken as soon
        as a budget has this much room; `event`: as soon as that event is sent to the run.
        """
        with self.database.write() as connection:
            if event is not None:
                self._lock(connection, step.run)
            self._facts(connection, step, calls)
            row = connection.execute(
                update(steps)
                .where(_held(step), steps.c.halted.is_(False))
                .values(
                    status=int(StepStatus.WAITING),
                    owner=None,
                    due=db_now(seconds),
                    attempt=steps.c.attempt + (1 if attempt else 0),
                )
                .returning(steps.c.id)
            ).first()
            if row is not None:
                kind = "step.retry" if attempt else "step.waiting"
                data = {"why": reason, "seconds": round(seconds, 3)}
                tell(connection, step.run, step.row, kind, message, data)
                if room is not None:
                    settling.wait(connection, step.id, room)
                if event is not None:
                    waits.wait(connection, step.id, event)
                return Waiting()
            return self._refusal(connection, step)

    @staticmethod
    def _refusal(connection: Connection, step: Claimed) -> Refusal:
        """Return why a claimed step could not be changed."""
        held = connection.execute(select(steps.c.id).where(_held(step))).first()
        return Refusal.LOST if held is None else Refusal.STOPPED

    def _facts(self, connection: Connection, step: Claimed, calls: Sequence[CallRecord]) -> None:
        settling.settle(connection, encoding.settlements(step, calls))
        lost_calls.store_calls(connection, encoding.calls(step, calls, step.attempt, datetime.now(UTC)))

    def wake(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Make waiting steps ready if their time has come."""
        awake = (
            update(steps)
            .where(steps.c.id.in_(ids), steps.c.status == int(StepStatus.WAITING), steps.c.due <= db_now(0.005))
            .values(status=int(StepStatus.READY), due=db_now(LOST_SECONDS))
            .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes)
        )
        with self.database.write() as connection:
            heads = [ReadyStep(*row) for row in connection.execute(awake)]
            settling.leave(connection, [head.id for head in heads])
            return heads

    @_tried_again
    def send_event(self, run: int, name: str, data: Any) -> list[ReadyStep]:
        """Send an event to a run; return the steps that waited for it.  Raises Conflict where the run has ended."""
        with self.database.write() as connection:
            status = self._lock(connection, run)
            if status in FINISHED_RUN:
                raise Conflict(f"The run has already {_ENDED_AS[RunStatus(status)]}.")
            tell(connection, run, None, "run.event", name)
            return waits.send(connection, run, name, data)

    def take_event(self, run: int, name: str, step: int) -> Event | None:
        """Return the event that a step has taken, or takes now; None where none is there."""
        with self.database.write() as connection:
            return waits.take(connection, run, name, step)

    @_tried_again
    def expand(
        self,
        step: Claimed,
        rows: Sequence[Row],
        *,
        phase: str,
        round: int = 0,
        items: Sequence[Any] | None = None,
        window: int | None = None,
        reduce: int | None = None,
        calls: Sequence[CallRecord] = (),
    ) -> Children | Refusal:
        """Turn a claimed composite into its children; the composite waits for them.

        `rows` are numbered from 0.  `window`: how many items may be in progress at once; each item beyond it has an
        extra dependency, which the composite releases.
        """
        with self.database.write() as connection:
            self._lock(connection, step.run)  # otherwise a concurrent stop of the run would miss the children
            parent = connection.execute(
                select(steps.c.id).where(_held(step), steps.c.halted.is_(False)).with_for_update()
            ).first()
            self._facts(connection, step, calls)
            if parent is None:
                return self._refusal(connection, step)
            base = connection.execute(
                update(runs)
                .where(runs.c.id == step.run)
                .values(next_row=runs.c.next_row + len(rows))
                .returning(runs.c.next_row)
            ).scalar_one() - len(rows)
            if base + len(rows) > ROW_MASK:
                raise Conflict(f"A run may have at most {ROW_MASK} steps; step {step.row} would expand beyond that.")
            connection.execute(
                update(steps)
                .where(steps.c.id == step.id)
                .values(
                    status=int(StepStatus.WAITING),
                    owner=None,
                    due=None,
                    deps_left=len(rows),
                    weight=int(Weight.INLINE),  # the worker that finishes its last child continues it
                    window_next=None if window is None else base + window,
                    window_end=None if window is None else base + len(rows) - (0 if reduce is None else 1),
                )
            )
            connection.execute(
                insert(expansions).values(
                    step_id=step.id,
                    round=round,
                    phase=phase,
                    base=base,
                    count=len(rows),
                    reduce=None if reduce is None else base + reduce,
                    items=None if items is None else encoding.dump(list(items)),
                )
            )
            self._insert_rows(connection, step.run, rows, offset=base)
            tell(connection, step.run, step.row, "step.expanded", "1 step" if len(rows) == 1 else f"{len(rows)} steps")
        heads = [
            ReadyStep(step_id(step.run, base + row.row), row.node, int(row.weight), row.queue)
            for row in rows
            if not row.deps_left
        ]
        return Children(heads, base)

    # Stopping

    @staticmethod
    def _lock(connection: Connection, run: int) -> int:
        """Lock a run and return its status.

        A transaction that changes more than a few steps of a run locks the run before its steps.
        """
        return int(connection.execute(select(runs.c.status).where(runs.c.id == run).with_for_update()).scalar_one())

    @_tried_again
    def fail(
        self,
        worker: Worker,
        keep: ClaimCapacity,
        finish: Finish,
        *,
        container: int,
        keeps: frozenset[int],
        run_fails: bool,
    ) -> TransitionResult:
        """Finish a failed step and stop the steps around it: no new step starts, but calls in flight finish.

        `container`: the row that continues when the last of them has ended (a composite, or the run's gate).
        `keeps`: top-level rows that may still run (the engine's own, on_error, finally).
        """
        with self.database.write() as connection:
            settling.settle(connection, _settlements([finish]))  # lock order: budgets before runs and steps
            self._lock(connection, finish.step.run)
            # Same rule as the fence: a step whose lease has expired may still fail, as long as no other worker has
            # taken it over.
            mine = connection.execute(
                update(steps).where(_fenced(finish.step)).values(status=int(StepStatus.RUNNING)).returning(steps.c.id)
            )
            if mine.first() is None:
                return self._claim_and_finish(connection, worker, keep, finishes=[finish])
            reason = "the run stopped because a step failed" if run_fails else "another step of the same part failed"
            heads = cancellation.halt(connection, finish.step.run, container, keeps, reason)
            if run_fails:
                cancellation.finishing(connection, finish.step.run, error=finish.result.error)
            advance = self._claim_and_finish(connection, worker, keep, finishes=[finish])
            advance.ready += heads
        return advance

    @_tried_again
    def stop(
        self, run: int, *, gate: int, keeps: frozenset[int], error: Mapping[str, Any] | None, reason: str
    ) -> list[ReadyStep]:
        """Cancel a run (or fail it, if `error` is given): only its final steps may still start.

        Raises Conflict if the run has already finished.  A run that is already finishing continues to do so.  A run
        that waits for its concurrency key ends immediately.
        """
        end: telemetry.RunEnded | None = None
        heads: list[ReadyStep] = []
        with self.database.write() as connection:
            status = self._lock(connection, run)
            if status in FINISHED_RUN:
                raise Conflict(f"The run has already {_ENDED_AS[RunStatus(status)]}.")
            if status == RunStatus.QUEUED and concurrency.waits(connection, run):
                concurrency.end_waiting(connection, run, reason)
                end = _end(connection, run)
            else:
                if error is None:
                    connection.execute(update(runs).where(runs.c.id == run).values(cancelled=True))
                if status != RunStatus.FINISHING:
                    heads = cancellation.halt(connection, run, gate, keeps, reason)
                    cancellation.finishing(connection, run, error=error)
        if end is not None:
            telemetry.emit(end)
        return heads

    @_tried_again
    def finish_run(
        self,
        worker: Worker,
        finish: Finish,
        *,
        status: RunStatus,
        outputs: Any,
        error: Mapping[str, Any] | None,
    ) -> RunClosed | Refusal:
        """Finish the run's last step, and the run with it.

        Returns the first steps of those runs of the same home that were waiting for its concurrency key; these steps
        are owed a message.
        """
        with self.database.write() as connection:
            ended = self._lock(connection, finish.step.run) in FINISHED_RUN
            advance = self._claim_and_finish(connection, worker, ClaimCapacity(fast=0), finishes=[finish])
            if advance.refused or ended:
                return Refusal.LOST
            ran = connection.execute(
                update(runs)
                .where(runs.c.id == finish.step.run)
                .values(
                    status=int(status),
                    active=False,
                    outputs=None if outputs is None else encoding.dump(outputs),
                    error=None if error is None else encoding.dump(dict(error)),
                    started_at=func.coalesce(runs.c.started_at, db_now()),
                    finished_at=db_now(),
                )
                .returning(runs.c.key_id, runs.c.max_parallel)
            ).one()
            if ran.max_parallel is not None:
                max_parallel.close_slots(connection, finish.step.run)
            tell(
                connection,
                finish.step.run,
                None,
                f"run.{status.name.lower()}",
                str(error["message"]) if error else None,
            )
            heads = concurrency.release(connection, finish.step.run, ran.key_id, home=worker.home, lost=LOST_SECONDS)
            end = _end(connection, finish.step.run)
        telemetry.emit(end)
        return RunClosed(heads)

    def tell(
        self, run: int, row: int | None, kind: str, message: str | None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Write one entry to the run's journal; `data` is for machines."""
        with self.database.write() as connection:
            tell(connection, run, row, kind, message, data)

    # Reading finished steps

    def checkpoints(self, ids: Sequence[int]) -> dict[int, Checkpoint]:
        """Return the checkpoints of those of the steps that have finished."""
        found: dict[int, Checkpoint] = {}
        with self.database.read() as connection:
            for part in chunks(ids):
                query = (
                    select(checkpoints, blobs.c.body)
                    .select_from(checkpoints.outerjoin(blobs, blobs.c.step_id == checkpoints.c.step_id))
                    .where(checkpoints.c.step_id.in_(part))
                )
                for row in connection.execute(query):
                    found[row.step_id] = _checkpoint(row)
        return found

    def states(self, ids: Sequence[int]) -> dict[int, tuple[int, int]]:
        """Return step id → (status, queue) for those of the steps that exist."""
        query = select(steps.c.id, steps.c.status, steps.c.queue).where(steps.c.id.in_(ids))
        with self.database.read() as connection:
            return {row.id: (row.status, row.queue) for row in connection.execute(query)}

    def adoptable(self, root: int, fingerprint: str) -> Checkpoint | None:
        """Return the checkpoint of a step with the same fingerprint in this run or in a run that it continues."""
        with self.database.read() as connection:
            found = connection.scalar(
                select(fingerprints.c.step_id).where(fingerprints.c.root_id == root, fingerprints.c.hash == fingerprint)
            )
        return None if found is None else self.checkpoints([found]).get(found)

    def expansions(self, step: int) -> list[Expansion]:
        """Return the expansions of a composite, oldest round first."""
        query = select(expansions).where(expansions.c.step_id == step).order_by(expansions.c.round)
        with self.database.read() as connection:
            return [
                Expansion(
                    id=row.step_id,
                    phase=row.phase,
                    base=row.base,
                    count=row._mapping["count"],
                    round=row.round,
                    items=strict_json.loads_stored(row.items) if row.items else (),
                    reduce=row.reduce,
                )
                for row in connection.execute(query)
            ]

    def place(self, step: int) -> tuple[int, int | None, int | None]:
        """Return a row's (node, parent row, position).  These never change."""
        query = select(steps.c.node, steps.c.parent, steps.c.position).where(steps.c.id == step)
        with self.database.read() as connection:
            row = connection.execute(query).one()
        return row.node, row.parent, row.position

    # The canvas

    def attach(self, ids: Sequence[int]) -> None:
        """Mark pending steps whose message a canvas will send."""
        with self.database.write() as connection:
            connection.execute(
                update(steps).where(steps.c.id.in_(ids), steps.c.status == int(StepStatus.PENDING)).values(carried=True)
            )

    def detach(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Detach steps from their canvas.  Returns those that are already ready: they are owed a message now."""
        left = (
            update(steps)
            .where(steps.c.id.in_(ids), steps.c.carried)
            .values(carried=False)
            .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes, steps.c.status)
        )
        with self.database.write() as connection:
            return [ReadyStep(*row[:5]) for row in connection.execute(left) if row.status == StepStatus.READY]

    def detach_all(self, *, home: str, target: str | None = None) -> None:
        """Detach every step of the live runs from its canvas, because the broker has lost all messages."""
        lost = select(steps.c.id).select_from(live_steps()).where(is_live(home, target), steps.c.carried)
        with self.database.write() as connection:
            ids = list(connection.scalars(lost.order_by(steps.c.id).with_for_update(of=steps)))
            for part in chunks(ids):
                connection.execute(update(steps).where(steps.c.id.in_(part)).values(carried=False))

    # The backlog

    def enqueue(self, heads: Sequence[ReadyStep], team: str, *, first: bool = False) -> None:
        """Put ready steps on the backlog, in fair order among teams.  `first`: put them before all others (recovered
        steps).
        """
        if heads:
            with self.database.write() as connection:
                backlog.put(connection, heads, team, first=first)

    def dequeue(self, queue: int, count: int, *, target: str, home: str) -> list[ReadyStep]:
        """Take the next steps of a queue from the backlog; they are owed a message."""
        with self.database.write() as connection:
            return backlog.take(connection, queue, count, target=target, home=home)

    def shelved(self) -> dict[int, int]:
        """Return queue → number of steps on the backlog."""
        with self.database.statements() as connection:
            return backlog.sizes(connection)

    # The sweep

    def lead(self, name: str, owner: str, seconds: float) -> bool:
        """Become or remain the leader for a job, for `seconds`.  Returns whether `owner` is the leader."""
        with self.database.statements() as connection:
            return recovery.lead(connection, name, owner, seconds)

    def leads_for(self, name: str) -> float:
        """Return for how many more seconds a job has a leader; 0 if it has none."""
        with self.database.statements() as connection:
            return leads_for(connection, name)

    def activity(self, *, home: str, target: str) -> Activity:
        """Return the activity in a home's live runs.  One query, which tells whether a sweep has anything to do."""
        with self.database.statements() as connection:
            return activity(connection, home=home, target=target)

    @_tried_again
    def reap(
        self, *, home: str, target: str | None = None, sparing: int | None = None, thorough: bool = True
    ) -> Recovered:
        """Take back the steps of dead workers, so that they are ready again.

        If the dead worker held suspects (steps whose owners died twice), only these are blamed; otherwise all its steps
        are.  See `engine.poison`.  A step that was still running after its run had stopped is cancelled instead.

        `sparing`: the calling worker, which counts as alive whatever its lease says.  `thorough`: read every step of
        the live runs.  Otherwise they are read only if the sweep has not handled a dead worker yet.
        """
        freed: list[ReadyStep] = []
        with self.database.write() as connection:
            taken = recovery.reap(
                connection, home=home, target=target, sparing=sparing, thorough=thorough, limit=self.poison_deaths
            )
            for row in taken.stopped:
                freed += self._buried(connection, row)
            settling.abandon_orphans(connection)
        return Recovered(taken.ready, freed)

    def _buried(self, connection: Connection, row: Any) -> list[ReadyStep]:
        """End an ownerless step of a stopped run; return the steps that become ready as a result."""
        step = Claimed(row.id, row.token, row.node, row.weight, row.queue, 1, None, None, row.crashes)
        ended = Finish(step, Result(StepStatus.CANCELLED, reason="the run stopped before the step ended"))
        nobody = Worker(0, target="", home="", queues=())
        return self._claim_and_finish(connection, nobody, ClaimCapacity(0, 0, 0), finishes=[ended]).ready

    def overdue(
        self, *, home: str, target: str | None = None, limit: int = 2000, all_ready: bool = False
    ) -> tuple[list[tuple[ReadyStep, datetime]], list[int]]:
        """Return ready steps whose message may be lost (with the time since when), and waiting steps that are due to
        wake.

        `all_ready`: return every ready step that was published, however recently, because the broker has lost all
        messages.
        """
        with self.database.read() as connection:
            return recovery.overdue(connection, home=home, target=target, limit=limit, all_ready=all_ready)

    def redispatch(self, ids: Sequence[int]) -> list[int]:
        """Record that the messages of ready steps are sent again; returns the steps that are still ready."""
        with self.database.write() as connection:
            return recovery.redispatch(connection, ids)

    def expired_runs(self, *, home: str, target: str | None = None) -> list[int]:
        """Return the live runs whose deadline has passed."""
        with self.database.read() as connection:
            return recovery.expired(connection, home=home, target=target)

    def finished(self, run: int) -> tuple[bool, list[tuple[int, int]]]:
        """Return whether a run has ended, and (row, node) of its steps that succeeded and have a fingerprint."""
        query = (
            select(steps.c.id, steps.c.node)
            .select_from(
                runs.join(fingerprints, fingerprints.c.root_id == runs.c.root_id).join(
                    steps, steps.c.id == fingerprints.c.step_id
                )
            )
            .where(runs.c.id == run)
        )
        with self.database.read() as connection:
            status = connection.execute(select(runs.c.status).where(runs.c.id == run)).scalar_one()
            rows = connection.execute(query).all()
        return status in FINISHED_RUN, [(row.id & ROW_MASK, row.node) for row in rows]

    @_tried_again
    def close_orphan(self, run: int, *, cancelled: bool = False) -> bool:
        """End a run whose process died and cancel its unfinished steps.  Returns False if the run is alive or has
        ended.

        The run fails, or is cancelled if that was requested.  Runs that wait for its concurrency key can then take it.
        """
        with self.database.write() as connection:
            if self._lock(connection, run) in FINISHED_RUN:
                return False
            closed = recovery.close_orphan(connection, run, cancelled=cancelled)
            end = _end(connection, run) if closed else None
        if end is not None:
            telemetry.emit(end)
        return closed

    def orphaned(self, run: int) -> bool:
        """Return whether an embedded run has no live worker left."""
        with self.database.read() as connection:
            return connection.scalar(select(runs.c.id).where(runs.c.id == run, orphaned())) is not None


def _end(connection: Connection, run: int) -> telemetry.RunEnded:
    """Return the event that reports how a run has ended, to be emitted after the commit."""
    row = connection.execute(select(runs).where(runs.c.id == run)).one()
    error = (json.loads(row.error) if row.error else {}).get("message")
    seconds = max(0.0, (row.finished_at - row.created_at).total_seconds())
    ref = telemetry.RunRef(row.public_id, row.workflow, row.team, row.target, row.trace_id)
    return telemetry.RunEnded(ref, RunStatus(row.status).name.lower(), seconds, error)


def _initial(row: Row) -> int:
    if row.status is not None:
        return int(row.status)
    return int(StepStatus.PENDING if row.deps_left else StepStatus.READY)


def _null(value: Any) -> str:
    return "\\N" if value is None else str(value)


def _iso(value: Any) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} cannot be stored")


def _held(step: Claimed) -> Any:
    return and_(steps.c.id == step.id, steps.c.token == step.token, steps.c.status == int(StepStatus.RUNNING))


def _fenced(step: Claimed) -> Any:
    open_ = [int(StepStatus.READY), int(StepStatus.RUNNING)]
    return and_(steps.c.id == step.id, steps.c.token == step.token, steps.c.status.in_(open_))


def _encoded(
    finishes: Sequence[Finish],
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Return (finishes, calls, skips) in the form that `claim_and_finish.sql` takes.

    A second finish of the same claim would be refused; it is left out, but its calls are facts.
    """
    said: list[dict[str, Any]] = []
    facts: list[dict[str, Any]] = []
    skips: list[dict[str, Any]] = []
    seen: set[tuple[int, int]] = set()
    for finish in finishes:
        claim = finish.step.id, finish.step.token
        if claim not in seen:
            said.append(encoding.checkpoint(finish))
        seen.add(claim)
        if finish.result.calls:
            at = finish.result.finished_at or datetime.now(UTC)
            facts += encoding.calls(finish.step, finish.result.calls, finish.result.attempts, at)
        run = finish.step.run
        skips += [
            {"step_id": step_id(run, row), "detail": encoding.dump({"reason": reason})}
            for row, reason in finish.skipped.items()
        ]
    return said, facts, skips


def _settlements(finishes: Sequence[Finish]) -> list[dict[str, Any]]:
    return [fact for finish in finishes for fact in encoding.settlements(finish.step, finish.result.calls)]


def _advance(rows: Sequence[tuple[Any, ...]]) -> TransitionResult:
    advance = TransitionResult()
    for what, key, token, node, weight, queue, attempt, parent, position, crashes, unmet in rows:
        if what == 1:
            advance.mine.append(Claimed(key, token, node, weight, queue, attempt, parent, position, crashes, unmet))
        elif what == 2:
            advance.ready.append(ReadyStep(key, node, weight, queue, crashes))
        elif what == 4:
            advance.counted.append(key)
        elif what == 5:
            advance.lapsed = True
        elif what == 6:
            advance.suspects.append(key)
        else:
            advance.refused.append(key)
    return advance


def _checkpoint(row: Any) -> Checkpoint:
    detail = strict_json.loads_stored(row.detail) if row.detail else {}
    body = row.body if row.body is not None else row.output
    return Checkpoint(
        id=row.step_id,
        status=StepStatus(row.status),
        output=None if body is None else strict_json.loads_stored(body),
        error=detail.pop("error", None),
        reason=detail.pop("reason", None),
        detail=detail,
        attempts=row.attempts,
        finished_at=row.finished_at,
    )
