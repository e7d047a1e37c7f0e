"""The sweep: recovers steps of dead workers, lost messages, and runs whose process died or whose deadline passed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.engine.records import ROW_BITS, ROW_MASK, ReadyStep, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence import concurrency, deaths, encoding, lost_calls, settling
from gorgon_common.persistence.endings import run_ended
from gorgon_common.persistence.journal import tell, tell_cancelled
from gorgon_common.persistence.predicates import LOST_SECONDS, chunks, is_live, live_steps, orphaned
from gorgon_common.persistence.tables import backlog, db_now, leaders, runs, steps, workers

_CLAIM = (steps.c.id, steps.c.token, steps.c.node, steps.c.attempt)


def lead(connection: Connection, name: str, owner: str, seconds: float) -> bool:
    """Become or remain the leader for a job, for `seconds`.  Returns whether `owner` is the leader."""
    taken = connection.execute(
        update(leaders)
        .where(leaders.c.name == name, or_(leaders.c.owner == owner, leaders.c.until < db_now()))
        .values(owner=owner, until=db_now(seconds))
    )
    if taken.rowcount:
        return True
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    first = connection.execute(
        dialect.insert(leaders)
        .values(name=name, owner=owner, until=db_now(seconds))
        .on_conflict_do_nothing(index_elements=["name"])
        .returning(leaders.c.name)
    ).first()
    return first is not None


@dataclass(frozen=True, slots=True)
class Taken:
    """Steps taken back from dead workers.

    `ready`: they are ready again.  `stopped`: rows of stopped runs, which the caller has to end.
    """

    ready: list[ReadyStep]
    stopped: list[Any]


def reap(
    connection: Connection, *, home: str, target: str | None, sparing: int | None, thorough: bool, limit: int
) -> Taken:
    """Take back the steps of dead workers; see `Store.reap`.

    The search starts from the steps: every running step whose worker has no valid lease is taken back.
    """
    dead = workers.c.lease_until < db_now()
    unknown = [workers.c.home == home, *([] if target is None else [workers.c.target == target])]
    died = set(connection.scalars(select(workers.c.id).where(dead, workers.c.reaped.is_(False), *unknown)))
    died.discard(sparing or 0)
    if not died and not thorough:
        return Taken([], [])
    running = is_live(home, target), steps.c.status == int(StepStatus.RUNNING)
    stray = (
        select(steps.c.owner)
        .distinct()
        .select_from(live_steps().outerjoin(workers, workers.c.id == steps.c.owner))
        .where(*running, or_(workers.c.id.is_(None), dead))
    )
    strays = {owner for owner in connection.scalars(stray) if owner is None or owner != sparing}
    # A worker that renews its lease at this moment keeps its steps.  Its row lock decides whether it or the sweep is
    # first.
    found = {owner for owner in strays | died if owner is not None}
    locked = connection.scalars(
        select(workers.c.id)
        .where(workers.c.id.in_(found), dead)
        .order_by(workers.c.id)
        .with_for_update(skip_locked=True)
    ).all()
    known = set(connection.scalars(select(workers.c.id).where(workers.c.id.in_(found))))
    taken = Taken([], [])
    for owner in (*locked, *sorted(found - known), *([None] if None in strays else [])):
        whose = steps.c.owner.is_(None) if owner is None else steps.c.owner == owner
        held = connection.execute(
            select(
                steps.c.id, steps.c.token, steps.c.node, steps.c.due, steps.c.attempt, steps.c.crashes, steps.c.halted
            )
            .select_from(live_steps())
            .where(*running, whose)
            .order_by(steps.c.id)
            .with_for_update(of=steps)
        ).all()
        _take_back(connection, owner, held, taken, limit)
    if locked:
        connection.execute(update(workers).where(workers.c.id.in_(locked)).values(reaped=True))
    return taken


def _take_back(connection: Connection, owner: int | None, held: Sequence[Any], taken: Taken, limit: int) -> None:
    lost_calls.enter(connection, held)
    settling.abandon(connection, [row.id for row in held])
    crashes = deaths.enter(connection, owner, held, limit=limit)
    for row in held:
        back = connection.execute(
            update(steps)
            .where(steps.c.id == row.id)
            .values(status=int(StepStatus.READY), owner=None, due=db_now(LOST_SECONDS), crashes=crashes[row.id])
            .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes, steps.c.token)
        ).one()
        if row.halted:
            taken.stopped.append(back)
            continue
        taken.ready.append(ReadyStep(*back[:5]))
        tell(connection, row.id >> ROW_BITS, row.id & ROW_MASK, "step.recovered", "its worker died")


def overdue(
    connection: Connection, *, home: str, target: str | None, limit: int, all_ready: bool
) -> tuple[list[tuple[ReadyStep, datetime]], list[int]]:
    """Return ready steps whose message may be lost, and waiting steps that are due to wake; see `Store.overdue`."""
    late = steps.c.due < db_now()
    sent = and_(steps.c.due.is_not(None), steps.c.status == int(StepStatus.READY))
    query = (
        select(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes, steps.c.due, steps.c.status)
        .select_from(live_steps())
        .where(
            is_live(home, target),
            runs.c.active,
            steps.c.status.in_([int(StepStatus.READY), int(StepStatus.WAITING)]),
            or_(late, sent) if all_ready else late,
        )
        .order_by(steps.c.id)
        .limit(limit)
    )
    lost: list[tuple[ReadyStep, datetime]] = []
    sleepers: list[int] = []
    for row in connection.execute(query):
        if row.status == StepStatus.READY:
            lost.append((ReadyStep(*row[:5]), row.due))
        else:
            sleepers.append(row.id)
    return lost, sleepers


def redispatch(connection: Connection, ids: Sequence[int]) -> list[int]:
    """Record that the messages of ready steps are sent again; returns the steps that are still ready."""
    still: list[int] = []
    for part in chunks(ids):
        still += connection.scalars(
            update(steps)
            .where(steps.c.id.in_(part), steps.c.status == int(StepStatus.READY))
            .values(due=db_now(LOST_SECONDS), carried=False)
            .returning(steps.c.id)
        )
    return still


def expired(connection: Connection, *, home: str, target: str | None) -> list[int]:
    """Return the live runs whose deadline has passed."""
    query = select(runs.c.id).where(
        is_live(home, target), runs.c.status != int(RunStatus.FINISHING), runs.c.deadline < db_now()
    )
    return list(connection.scalars(query))


def close_orphan(connection: Connection, run: int, *, cancelled: bool) -> bool:
    """End a run whose process died.  Returns False if the process did not die, or if the run is alive again.

    The caller has locked the run, and it has not ended.
    """
    if connection.scalar(select(runs.c.id).where(runs.c.id == run, orphaned())) is None:
        return False
    status = RunStatus.CANCELLED if cancelled else RunStatus.FAILED
    died = "The process of the run died."
    error = {"message": died, "kind": "orphaned", "hint": None, "step": None, "summary": died}
    low, high = step_id(run, 0), step_id(run + 1, 0)
    tell_cancelled(connection, run)
    running = connection.execute(
        select(*_CLAIM).where(steps.c.id >= low, steps.c.id < high, steps.c.status == int(StepStatus.RUNNING))
    ).all()
    connection.execute(
        update(steps)
        .where(steps.c.id >= low, steps.c.id < high, steps.c.status < int(StepStatus.SUCCEEDED))
        .values(status=int(StepStatus.CANCELLED))
    )
    connection.execute(delete(backlog).where(backlog.c.step_id >= low, backlog.c.step_id < high))
    lost_calls.enter(connection, running)
    settling.abandon_run(connection, run)
    key = connection.execute(
        update(runs)
        .where(runs.c.id == run)
        .values(
            status=int(status),
            active=False,
            cancelled=cancelled,
            error=None if cancelled else encoding.dump(error),
            finished_at=db_now(),
        )
        .returning(runs.c.key_id)
    ).scalar_one()
    run_ended(connection, run, died)
    concurrency.release(connection, run, key, home=None, lost=LOST_SECONDS)
    return True
