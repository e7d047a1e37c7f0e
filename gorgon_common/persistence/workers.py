"""Workers: who may claim steps, and for how long."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from sqlalchemy import Connection, insert, select, update

from gorgon_common.engine.records import (
    Renewal,
)
from gorgon_common.persistence import (
    encoding,
)
from gorgon_common.persistence.tables import (
    db_now,
    workers,
)


class Worker:
    """A registered worker, which claims steps."""

    def __init__(self, owner: int, *, target: str, home: str, queues: Sequence[int]) -> None:
        self.owner = owner
        self.target = target
        self.home = home
        self.queues = list(queues)


def register(
    connection: Connection, name: str, *, target: str, home: str, queues: Sequence[int], slots: int, lease: float
) -> Worker:
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
    owner = connection.execute(row.returning(workers.c.id)).scalar_one()
    return Worker(owner, target=target, home=home, queues=queues)


def heartbeat(connection: Connection, worker: Worker, lease: float, watermarks: Mapping[int, float]) -> Renewal:
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
    if connection.execute(beat.where(workers.c.reaped.is_(False))).rowcount == 1:
        return Renewal.RENEWED
    revived = connection.execute(beat.values(reaped=False)).rowcount == 1
    return Renewal.REVIVED if revived else Renewal.UNKNOWN


def watermarks(connection: Connection, *, home: str, target: str | None = None) -> dict[int, float]:
    """Return queue → send time of the newest message that any worker has claimed (seconds since 1970)."""
    query = select(workers.c.watermarks).where(
        workers.c.home == home,
        workers.c.watermarks.is_not(None),
        *([] if target is None else [workers.c.target == target]),
    )
    found: dict[int, float] = {}
    for marks in connection.scalars(query.order_by(workers.c.id.desc()).limit(500)):
        for queue, mark in json.loads(marks).items():
            found[int(queue)] = max(found.get(int(queue), 0.0), mark)
    return found


def retire(connection: Connection, worker: Worker) -> None:
    """End a worker's lease now, so that the steps it still holds are taken over immediately."""
    over = update(workers).where(workers.c.id == worker.owner).values(lease_until=db_now(-1), retired=True)
    connection.execute(over)


def vacate(connection: Connection, home: str) -> None:
    """End the leases of a home whose process is known to be dead, so that its runs can be resumed immediately."""
    connection.execute(
        update(workers).where(workers.c.home == home, workers.c.lease_until > db_now()).values(lease_until=db_now(-1))
    )


def slots(connection: Connection, target: str, home: str) -> dict[int, int]:
    """Return queue → total slots of the live workers that serve it."""
    query = select(workers.c.queues, workers.c.slots).where(
        workers.c.target == target, workers.c.home == home, workers.c.lease_until > db_now()
    )
    found: dict[int, int] = {}
    for queues, slots in connection.execute(query):
        for queue in queues.split(","):
            found[int(queue)] = found.get(int(queue), 0) + slots
    return found
