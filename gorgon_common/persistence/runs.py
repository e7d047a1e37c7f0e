"""Runs: how they are created, stopped and ended.  Each function is part of its caller's transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from sqlalchemy import Connection, and_, func, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common import strict_json
from gorgon_common.engine.records import (
    ROW_MASK,
    ClaimCapacity,
    Finish,
    NewRun,
    ReadyStep,
    Refusal,
    Row,
    RunClosed,
    RunInfo,
)
from gorgon_common.engine.states import FINISHED_RUN, RunStatus
from gorgon_common.errors import Conflict, NotFound
from gorgon_common.persistence import (
    cancellation,
    concurrency,
    encoding,
    max_parallel,
    recovery,
    waits,
)
from gorgon_common.persistence.database import scope_of
from gorgon_common.persistence.endings import run_ended
from gorgon_common.persistence.journal import tell
from gorgon_common.persistence.predicates import LOST_SECONDS, lock_run, orphaned
from gorgon_common.persistence.steps import insert_rows
from gorgon_common.persistence.tables import (
    db_now,
    fingerprints,
    plans,
    runs,
    steps,
)
from gorgon_common.persistence.transitions import claim_and_finish
from gorgon_common.persistence.workers import Worker

_ENDED_AS = {
    RunStatus.SUCCEEDED: "succeeded",
    RunStatus.FAILED: "failed",
    RunStatus.CANCELLED: "been cancelled",
}


def create(connection: Connection, new: NewRun, rows: Sequence[Row]) -> tuple[int, bool]:
    """Insert a run with its steps; steps without dependencies are ready.

    The scope of the transaction says for which organisation, and who asked for it.

    If the run has to wait for its concurrency key, none of its steps can be claimed until the run holds the key;
    see `admission`.  Returns (id, True), or (id of the run that has this idempotency key, False).  Raises Conflict
    if that run was a different request, and KeyTaken if the run may not wait.
    """
    new = replace(new, org=scope_of(connection).org)
    if new.idempotency_key is not None:
        known = _known(connection, new)
        if known is not None:
            return known, False
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(
        dialect.insert(plans)
        .values(hash=new.plan_hash, org_id=new.org, body=new.plan_body, created_at=new.created_at)
        .on_conflict_do_nothing(index_elements=["org_id", "hash"])
    )
    key, place = None, concurrency.Place.HOLDS
    if new.hold is not None:
        key = concurrency.lock(connection, new, new.hold)
        # The transaction that held the lock on the key until now may have created this very run.
        known = _known(connection, new) if new.idempotency_key is not None else None
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
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    # Two concurrent requests with the same key may both pass the check above; the unique constraint admits only
    # one.
    inserted = connection.execute(
        dialect.insert(runs)
        .values(values)
        .on_conflict_do_nothing(index_elements=["org_id", "idempotency_key"])
        .returning(runs.c.id)
    ).scalar_one_or_none()
    if inserted is None:
        return cast(int, _known(connection, new)), False
    run = int(inserted)
    if new.root is None:
        connection.execute(update(runs).where(runs.c.id == run).values(root_id=run))
    insert_rows(connection, run, rows, offset=0)
    if new.max_parallel is not None:
        max_parallel.open_slots(connection, run)
    if key is not None and new.hold is not None:
        concurrency.settle_in(connection, run, key, place, new.hold, new.timeout)
    message = None if holds else "the run waits for its concurrency key"
    tell(connection, run, None, "run.resumed" if new.resumed_from else "run.queued", message)
    return run, True


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


def info(connection: Connection, run: int) -> RunInfo:
    """Return what workers need to know about a run.  Raises NotFound."""
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


def begin(connection: Connection, run: int) -> None:
    """Mark a queued run as running, because a worker has claimed one of its steps."""
    started = connection.execute(
        update(runs)
        .where(runs.c.id == run, runs.c.status == int(RunStatus.QUEUED), runs.c.active)
        .values(status=int(RunStatus.RUNNING), started_at=db_now())
    )
    if started.rowcount:
        tell(connection, run, None, "run.started", None)


def plan_body(connection: Connection, plan_hash: str) -> str:
    """Return a stored plan's JSON.  Raises NotFound."""
    # Plans with the same hash are the same, whichever organisation's they are.
    body = connection.scalar(select(plans.c.body).where(plans.c.hash == plan_hash).limit(1))
    if body is None:
        raise NotFound(f"There is no plan {plan_hash}.")
    return cast(str, body)


def failure(connection: Connection, run: int) -> tuple[dict[str, Any] | None, bool]:
    """Return the error of the step that failed the run, and whether the run was cancelled."""
    row = connection.execute(select(runs.c.error, runs.c.cancelled).where(runs.c.id == run)).one()
    return (strict_json.loads_stored(row.error) if row.error else None), bool(row.cancelled)


def cancelled(connection: Connection, run_ids: Iterable[int]) -> set[int]:
    """Return those of the runs that were cancelled on request, or that were stopped because their deadline passed.

    A run that is past its deadline but has not been stopped yet is not included: if its calls were aborted now, the
    steps after them would start.
    """
    wanted = list(run_ids)
    if not wanted:
        return set()
    late = and_(runs.c.deadline < db_now(), runs.c.status == int(RunStatus.FINISHING))
    return set(connection.scalars(select(runs.c.id).where(runs.c.id.in_(wanted), or_(runs.c.cancelled, late))))


def finished(connection: Connection, run: int) -> tuple[bool, list[tuple[int, int]]]:
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
    status = connection.execute(select(runs.c.status).where(runs.c.id == run)).scalar_one()
    rows = connection.execute(query).all()
    return status in FINISHED_RUN, [(row.id & ROW_MASK, row.node) for row in rows]


def stop(
    connection: Connection,
    run: int,
    *,
    gate: int,
    keeps: frozenset[int],
    error: Mapping[str, Any] | None,
    reason: str,
) -> list[ReadyStep]:
    """Cancel a run (or fail it, if `error` is given): only its final steps may still start.

    Raises Conflict if the run has already finished.  A run that is already finishing continues to do so.  A run
    that waits for its concurrency key ends immediately.
    """
    heads: list[ReadyStep] = []
    status = lock_run(connection, run)
    if status in FINISHED_RUN:
        raise Conflict(f"The run has already {_ENDED_AS[RunStatus(status)]}.")
    if status == RunStatus.QUEUED and concurrency.waits(connection, run):
        concurrency.end_waiting(connection, run, reason)
    else:
        if error is None:
            connection.execute(update(runs).where(runs.c.id == run).values(cancelled=True))
        if status != RunStatus.FINISHING:
            heads = cancellation.halt(connection, run, gate, keeps, reason)
            cancellation.finishing(connection, run, error=error)
    return heads


def finish_run(
    connection: Connection,
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
    ended = lock_run(connection, finish.step.run) in FINISHED_RUN
    advance = claim_and_finish(connection, worker, ClaimCapacity(fast=0), finishes=[finish])
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
        .returning(runs.c.key_id)
    ).one()
    run_ended(connection, finish.step.run, str(error["message"]) if error else None)
    heads = concurrency.release(connection, finish.step.run, ran.key_id, home=worker.home, lost=LOST_SECONDS)
    return RunClosed(heads)


def is_orphaned(connection: Connection, run: int) -> bool:
    """Return whether an embedded run has no live worker left."""
    return connection.scalar(select(runs.c.id).where(runs.c.id == run, orphaned())) is not None


def close_orphan(connection: Connection, run: int, *, cancelled: bool = False) -> bool:
    """End a run whose process died and cancel its unfinished steps.

    Returns False if the run is alive or has ended.  The run fails, or is cancelled if that was requested.  Runs that
    wait for its concurrency key can then take it.
    """
    if lock_run(connection, run) in FINISHED_RUN:
        return False
    return recovery.close_orphan(connection, run, cancelled=cancelled)


def send_event(connection: Connection, run: int, name: str, data: Any) -> list[ReadyStep]:
    """Send an event to a run; return the steps that waited for it.  Raises Conflict where the run has ended."""
    status = lock_run(connection, run)
    if status in FINISHED_RUN:
        raise Conflict(f"The run has already {_ENDED_AS[RunStatus(status)]}.")
    tell(connection, run, None, "run.event", name)
    return waits.send(connection, run, name, data)
