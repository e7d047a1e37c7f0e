"""Tells whether the sweep has anything to do, with one query instead of the many of a whole pass."""

from __future__ import annotations

from sqlalchemy import Connection, case, exists, func, literal, select

from gorgon_common.engine.records import Activity
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence.concurrency import Place
from gorgon_common.persistence.predicates import is_live, live_steps, moment
from gorgon_common.persistence.tables import (
    backlog,
    budget_alerts,
    concurrency_places,
    db_now,
    held_steps,
    leaders,
    runs,
    steps,
    workers,
)

_DUE = (int(StepStatus.READY), int(StepStatus.WAITING))
_UNDER_WAY = (int(StepStatus.READY), int(StepStatus.RUNNING))


def activity(connection: Connection, *, home: str, target: str) -> Activity:
    """Return the activity in the live runs of a home."""
    live = is_live(home, target)
    waking = case((runs.c.active & steps.c.status.in_(_DUE), steps.c.due))
    under_way = case((steps.c.status.in_(_UNDER_WAY), 1), else_=0)
    deadline = select(func.min(runs.c.deadline)).where(live, runs.c.status != int(RunStatus.FINISHING))
    elsewhere = exists(select(literal(1)).select_from(backlog)) | exists(select(literal(1)).select_from(held_steps))
    contested = exists(select(literal(1)).where(concurrency_places.c.state != int(Place.HOLDS)))
    died = exists(
        select(literal(1)).where(
            workers.c.home == home,
            workers.c.target == target,
            workers.c.reaped.is_(False),
            workers.c.lease_until < db_now(),
        )
    )
    untold = exists(select(literal(1)).where(budget_alerts.c.told_at.is_(None)))  # the pass reports them
    columns = (deadline.scalar_subquery(), elsewhere | contested, db_now(), died | untold)
    row = connection.execute(
        select(func.min(waking), func.max(under_way), *columns).select_from(live_steps()).where(live)
    ).one()
    now = moment(row[4])
    times = [(due - now).total_seconds() for due in (row[0], row[2]) if due is not None]
    return Activity(busy=bool(row[1] or row[3]), next=min(times, default=None), pressing=bool(row[3] or row[5]))


def leads_for(connection: Connection, name: str) -> float:
    """Return for how many more seconds a job has a leader; 0 if it has none."""
    row = connection.execute(select(leaders.c.until, db_now()).where(leaders.c.name == name)).first()
    return 0.0 if row is None else max(0.0, (row[0] - moment(row[1])).total_seconds())
