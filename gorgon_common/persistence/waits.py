"""Events that are sent to runs, and the steps that wait for them.

An event is kept until a step takes it: it may be sent before the step begins to wait.  One event lets one step go on,
the oldest event first.  Whatever sends, waits or takes locks the run's row first, so that no event can slip between a
step that looks and the same step that goes to sleep.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common import strict_json
from gorgon_common.engine.records import ROW_BITS, Event, ReadyStep
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence import encoding
from gorgon_common.persistence.predicates import LOST_SECONDS
from gorgon_common.persistence.tables import db_now, event_waits, run_events, runs, steps


def send(connection: Connection, run: int, name: str, data: Any) -> list[ReadyStep]:
    """Store an event of a run whose row is locked; return the waiting steps that look for it: they are ready now."""
    connection.execute(insert(run_events).values(run_id=run, name=name, at=db_now(), data=encoding.dump(data)))
    waiting = select(event_waits.c.step_id).where(event_waits.c.run_id == run, event_waits.c.name == name)
    woken = connection.execute(
        update(steps)
        .where(steps.c.id.in_(waiting), steps.c.status == int(StepStatus.WAITING))
        .values(status=int(StepStatus.READY), due=db_now(LOST_SECONDS))
        .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes)
    )
    return [ReadyStep(*row) for row in woken]


def take(connection: Connection, run: int, name: str, step: int) -> Event | None:
    """Return the event that a step has taken, or takes now; None where none is there."""
    _lock(connection, run)
    mine = select(run_events).where(run_events.c.run_id == run, run_events.c.name == name)
    found = connection.execute(mine.where(run_events.c.step_id == step)).first()
    if found is None:
        found = connection.execute(
            mine.where(run_events.c.step_id.is_(None)).order_by(run_events.c.id).limit(1)
        ).first()
        if found is None:
            return None
        connection.execute(update(run_events).where(run_events.c.id == found.id).values(step_id=step))
    connection.execute(delete(event_waits).where(event_waits.c.step_id == step))
    return Event(strict_json.loads_stored(found.data), found.at)


def wait(connection: Connection, step: int, name: str) -> None:
    """Note what a step that has just been parked waits for; it wakes at once where the event is there already.

    The run's row is locked, since before the step was changed: whatever stops a run takes the locks in that order.
    """
    run = step >> ROW_BITS
    dialect: Any = sqlite if connection.dialect.name == "sqlite" else postgresql
    noted = dialect.insert(event_waits).values(step_id=step, run_id=run, name=name)
    connection.execute(noted.on_conflict_do_update(index_elements=["step_id"], set_={"name": name}))
    there = select(run_events.c.id).where(
        run_events.c.run_id == run, run_events.c.name == name, run_events.c.step_id.is_(None)
    )
    if connection.execute(there.limit(1)).first() is not None:
        connection.execute(update(steps).where(steps.c.id == step).values(due=db_now()))


def _lock(connection: Connection, run: int) -> None:
    connection.execute(select(runs.c.id).where(runs.c.id == run).with_for_update())
