"""The backlog: ready steps that have not been sent yet, in fair order among teams.

Weighted fair queueing by rank: a team's next step gets the team's next rank, but never one below the lowest that waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from typing import Any, cast

from sqlalchemy import Connection, case, delete, func, literal, literal_column, select, update
from sqlalchemy.dialects import postgresql, sqlite

from gorgon_common.engine.records import ROW_BITS, ReadyStep
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence.predicates import LOST_SECONDS, chunks
from gorgon_common.persistence.tables import backlog, db_now, runs, shares, steps
from gorgon_common.scope import FIRST_ORG


def put(connection: Connection, heads: Sequence[ReadyStep], team: str, *, first: bool) -> None:
    """Put ready steps of one run on the backlog; `first`: before all others, whatever their runs."""
    for part in chunks([head.id for head in heads]):
        connection.execute(
            update(steps).where(steps.c.id.in_(part), steps.c.status == int(StepStatus.READY)).values(due=None)
        )
    # Teams of the same name in two organisations take turns like any two teams.
    run = heads[0].id >> ROW_BITS
    org = 0 if first else connection.scalar(select(runs.c.org_id).where(runs.c.id == run)) or FIRST_ORG
    by_queue: dict[int, list[ReadyStep]] = {}
    for head in heads:
        by_queue.setdefault(head.queue, []).append(head)
    driver = cast(Any, connection.connection.driver_connection)
    for queue, members in sorted(by_queue.items()):
        rank = -1 if first else _rank(connection, queue, org, team, len(members))
        ids = [head.id for head in members]
        ranks = [rank] * len(ids) if first else list(range(rank, rank + len(ids)))
        if connection.dialect.name == "sqlite":
            rows = zip(repeat(queue), ranks, ids)
            driver.executemany("INSERT OR IGNORE INTO backlog (queue, rank, step_id) VALUES (?, ?, ?)", rows)
        else:
            driver.execute(
                "INSERT INTO backlog (queue, rank, step_id) SELECT %s, * FROM"
                " unnest(%s::bigint[], %s::bigint[]) ON CONFLICT DO NOTHING",
                (queue, ranks, ids),
            )


def _rank(connection: Connection, queue: int, org: int, team: str, count: int) -> int:
    """Return the first rank of an organisation's team for `count` more steps."""
    now = connection.scalar(select(func.min(backlog.c.rank)).where(backlog.c.queue == queue, backlog.c.rank >= 0))
    dialect = sqlite if connection.dialect.name == "sqlite" else postgresql
    connection.execute(
        dialect.insert(shares)
        .values(org_id=org, queue=queue, team=team, next_rank=0)
        .on_conflict_do_nothing(index_elements=["org_id", "queue", "team"])
    )
    own = shares.c.next_rank
    start = own if now is None else case((own < now, literal(now)), else_=own)
    after = connection.execute(
        update(shares)
        .where(shares.c.org_id == org, shares.c.queue == queue, shares.c.team == team)
        .values(next_rank=start + count)
        .returning(own)
    ).scalar_one()
    return int(after) - count


def take(connection: Connection, queue: int, count: int, *, target: str, home: str) -> list[ReadyStep]:
    """Take the next steps of a queue; they are owed a message."""
    picked = (
        select(backlog.c.queue, backlog.c.rank, backlog.c.step_id)
        .select_from(backlog.join(runs, runs.c.id == backlog.c.step_id.op(">>")(literal_column(str(ROW_BITS)))))
        .where(backlog.c.queue == queue, runs.c.active, runs.c.target == target, runs.c.home == home)
        .order_by(backlog.c.rank, backlog.c.step_id)
        .limit(count)
        .with_for_update(of=backlog, skip_locked=True)
    )
    ids = [row.step_id for row in connection.execute(picked).all()]
    if not ids:
        return []
    connection.execute(delete(backlog).where(backlog.c.queue == queue, backlog.c.step_id.in_(ids)))
    rows = connection.execute(
        update(steps)
        .where(steps.c.id.in_(ids), steps.c.status == int(StepStatus.READY))
        .values(due=db_now(LOST_SECONDS))
        .returning(steps.c.id, steps.c.node, steps.c.weight, steps.c.queue, steps.c.crashes)
    ).all()
    by_id = {row.id: ReadyStep(*row) for row in rows}
    return [by_id[key] for key in ids if key in by_id]


def sizes(connection: Connection) -> dict[int, int]:
    """Return queue → number of steps on the backlog."""
    query = select(backlog.c.queue, func.count()).group_by(backlog.c.queue)
    return {row[0]: row[1] for row in connection.execute(query)}
