"""Queries shared by parts of the store: runs that have not ended, and their steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from sqlalchemy import Connection, and_, literal, select

from gorgon_common.engine.records import ROW_BITS
from gorgon_common.engine.states import RunStatus
from gorgon_common.persistence.tables import SQLITE_TIME, db_now, runs, steps, workers

Item = TypeVar("Item")

LOST_SECONDS = 5.0
"""A message that no worker has claimed for this long may be lost; the sweep checks."""
CHUNK = 500
"""Ids in one `IN (…)`: SQLite allows 32,766 parameters, and plans stay small."""
LIVE = (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.PAUSED, RunStatus.FINISHING)


def lock_run(connection: Connection, run: int) -> int:
    """Lock a run and return its status.

    A transaction that changes more than a few steps of a run locks the run before its steps.
    """
    return int(connection.execute(select(runs.c.status).where(runs.c.id == run).with_for_update()).scalar_one())


def chunks(ids: Sequence[Item]) -> Iterable[Sequence[Item]]:
    """Yield the ids (or rows) in parts of CHUNK."""
    for start in range(0, len(ids), CHUNK):
        yield ids[start : start + CHUNK]


def now(connection: Connection) -> datetime:
    """Return the database's clock."""
    return moment(connection.execute(select(db_now())).scalar_one())


def moment(stored: Any) -> datetime:
    """Return what a query answered for `db_now()` as a time."""
    if isinstance(stored, str):  # SQLite
        return datetime.strptime(stored, SQLITE_TIME).replace(tzinfo=UTC)
    return cast(datetime, stored)


def live_steps() -> Any:
    """Return the join of runs and their steps."""
    low = runs.c.id * (1 << ROW_BITS)  # PostgreSQL has no bigint << bigint
    return runs.join(steps, and_(steps.c.id >= low, steps.c.id < low + (1 << ROW_BITS)))


def is_live(home: str, target: str | None = None) -> Any:
    """Return the condition that a run has not ended and belongs to a home."""
    return and_(
        runs.c.status.in_([int(status) for status in LIVE]),
        runs.c.home == home,
        *([] if target is None else [runs.c.target == target]),
    )


def orphaned() -> Any:
    """Return the condition that a run belongs to a single process, which has died."""
    alive = select(literal(1)).where(workers.c.home == runs.c.home, workers.c.lease_until > db_now())
    return and_(runs.c.home != "", ~alive.exists())


def lives(owner: int) -> Any:
    """Return the condition that a worker's lease is valid, so that it may claim.  Use it in the claiming statement."""
    held = select(literal(1)).where(
        workers.c.id == owner, workers.c.reaped.is_(False), workers.c.lease_until > db_now()
    )
    return held.exists()
