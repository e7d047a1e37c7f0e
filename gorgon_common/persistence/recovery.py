"""What the sweep does: steps of dead workers, messages that are lost, runs whose process died or whose time is up."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, and_, delete, or_, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.engine.records import ROW_BITS, ROW_MASK, Head, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence import concurrency, encoding, parallel, settling
from gorgon_common.persistence.journal import tell, tell_cancelled
from gorgon_common.persistence.live import LOST_SECONDS, SUSPECT_CRASHES, chunks, is_live, live_steps
from gorgon_common.persistence.tables import backlog, db_now, leaders, runs, steps, workers


def lead(connection: Connection, name: str, owner: str, seconds: float) -> bool:
    """Become or stay the one that does a job, for so many seconds."""
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(
        dialect.insert(leaders)
        .values(name=name, owner=owner, until=db_now(-1))
        .on_conflict_do_nothing(index_elements=["name"])
    )
    taken = connection.execute(
        update(leaders)
        .where(leaders.c.name == name, or_(leaders.c.owner == owner, leaders.c.until < db_now()))
        .values(owner=owner, until=db_now(seconds))
    )
    return taken.rowcount == 1


def reap(connection: Connection, *, home: str, target: str | None) -> tuple[list[tuple[Head, int]], list[Any]]:
    """Take the steps of dead workers back; see `Store.reap`.

    Returns those that are ready again with their tokens, and the rows of those whose run had stopped.
    """
    dead = select(workers.c.id).where(
        workers.c.reaped.is_(False),
        workers.c.lease_until < db_now(),
        workers.c.home == home,
        *([] if target is None else [workers.c.target == target]),
    )
    taken: list[tuple[Head, int]] = []
    stopped: list[Any] = []
    for owner in connection.scalars(dead.with_for_update(skip_locked=True)).all():
        held = connection.execute(
            select(steps.c.id, steps.c.crashes, steps.c.halted)
            .select_from(live_steps())
            .where(is_live(home), steps.c.status == int(StepStatus.RUNNING), steps.c.owner == owner)
            .order_by(steps.c.id)
            .with_for_update(of=steps)
        ).all()
        settling.abandon(connection, [row.id for row in held])
        suspects = {row.id for row in held if row.crashes >= SUSPECT_CRASHES}
        for row in held:
            blamed = not suspects or row.id in suspects
            back = connection.execute(
                update(steps)
                .where(steps.c.id == row.id)
                .values(
                    status=int(StepStatus.READY),
                    owner=None,
                    due=db_now(LOST_SECONDS),
                    crashes=steps.c.crashes + (1 if blamed else 0),
                )
                .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes, steps.c.token)
            ).one()
            if row.halted:
                stopped.append(back)
                continue
            taken.append((Head(*back[:5]), back.token))
            tell(connection, row.id >> ROW_BITS, row.id & ROW_MASK, "step.recovered", "its worker died")
        connection.execute(update(workers).where(workers.c.id == owner).values(reaped=True))
    settling.abandon_orphans(connection)
    return taken, stopped


def overdue(
    connection: Connection, *, home: str, target: str | None, limit: int, all_ready: bool
) -> tuple[list[tuple[Head, datetime]], list[int]]:
    """Return ready steps whose message may be lost, and waiting ones to wake; see `Store.overdue`."""
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
    lost: list[tuple[Head, datetime]] = []
    sleepers: list[int] = []
    for row in connection.execute(query):
        if row.status == StepStatus.READY:
            lost.append((Head(*row[:5]), row.due))
        else:
            sleepers.append(row.id)
    return lost, sleepers


def redispatch(connection: Connection, ids: Sequence[int]) -> list[int]:
    """Note that messages of ready steps are sent anew; returns the steps that are still ready."""
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
    """Return the live runs whose time is up."""
    query = select(runs.c.id).where(
        is_live(home, target), runs.c.status != int(RunStatus.FINISHING), runs.c.deadline < db_now()
    )
    return list(connection.scalars(query))


def close_orphan(connection: Connection, run: int, *, cancelled: bool) -> None:
    """End a run whose process died; the run is locked, and has not ended."""
    status = RunStatus.CANCELLED if cancelled else RunStatus.FAILED
    died = "The process that ran it has died."
    error = {"message": died, "kind": "orphaned", "hint": None, "step": None, "summary": died}
    low, high = step_id(run, 0), step_id(run + 1, 0)
    tell_cancelled(connection, run)
    connection.execute(
        update(steps)
        .where(steps.c.id >= low, steps.c.id < high, steps.c.status < int(StepStatus.SUCCEEDED))
        .values(status=int(StepStatus.CANCELLED))
    )
    connection.execute(delete(backlog).where(backlog.c.step_id >= low, backlog.c.step_id < high))
    settling.abandon_run(connection, run)
    parallel.close_slots(connection, run)
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
    tell(connection, run, None, f"run.{status.name.lower()}", died)
    concurrency.release(connection, run, key, home=None, lost=LOST_SECONDS)
