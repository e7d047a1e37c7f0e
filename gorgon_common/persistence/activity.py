"""Tells whether the sweep has anything to do, with one query instead of the many of a whole pass."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import Connection, case, exists, func, literal, select

from gorgon_common.engine.records import Activity
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence.concurrency import Place
from gorgon_common.persistence.live import is_live, live_steps
from gorgon_common.persistence.tables import backlog, concurrency_places, held_steps, leaders, runs, steps

_UNDER_WAY = (int(StepStatus.READY), int(StepStatus.RUNNING))


def activity(connection: Connection, now: datetime, *, home: str, target: str) -> Activity:
    """Return the activity in the live runs of a home; `now` is the database's time."""
    live = is_live(home, target)
    waking = case((runs.c.active & (steps.c.status == int(StepStatus.WAITING)), steps.c.due))
    under_way = case((steps.c.status.in_(_UNDER_WAY), 1), else_=0)
    deadline = select(func.min(runs.c.deadline)).where(live, runs.c.status != int(RunStatus.FINISHING))
    elsewhere = exists(select(literal(1)).select_from(backlog)) | exists(select(literal(1)).select_from(held_steps))
    contested = exists(select(literal(1)).where(concurrency_places.c.state != int(Place.HOLDS)))
    row = connection.execute(
        select(func.min(waking), func.max(under_way), deadline.scalar_subquery(), elsewhere | contested)
        .select_from(live_steps())
        .where(live)
    ).one()
    times = [(moment - now).total_seconds() for moment in (row[0], row[2]) if moment is not None]
    return Activity(busy=bool(row[1] or row[3]), next=min(times, default=None))


def leads_for(connection: Connection, now: datetime, name: str) -> float:
    """Return for how many more seconds a job has a leader; 0 if it has none."""
    until = connection.scalar(select(leaders.c.until).where(leaders.c.name == name))
    return 0.0 if until is None else max(0.0, (until - now).total_seconds())
