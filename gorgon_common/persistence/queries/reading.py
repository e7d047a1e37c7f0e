"""One run as its explanation reads it: its rows, their names, and when each could begin."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, select

from gorgon_common import strict_json
from gorgon_common.costs.history import History
from gorgon_common.engine.records import ROW_MASK, step_id
from gorgon_common.persistence.queries.places import Places
from gorgon_common.persistence.tables import checkpoints, db_now, steps
from gorgon_common.workflow.plan import Plan

SHOWN = 50
"""The maximum number of steps listed one by one; the rest are counted."""
ROWS = 20_000


class Reading:
    """One run, read in one transaction."""

    def __init__(self, connection: Connection, run: Any, plan: Plan, history: History) -> None:
        self.connection = connection
        self.run = run
        self.plan = plan
        self.history = history
        self.now: datetime = connection.execute(select(db_now())).scalar_one()
        self.low, self.high = step_id(run.id, 0), step_id(run.id + 1, 0)
        self.places = Places(connection, run.id, plan)
        self.rows = {entry.id & ROW_MASK: entry for entry in self._rows()}
        self.names = self.places.of({key: entry.node for key, entry in self.rows.items()})
        self.details = {
            key: strict_json.loads_stored(entry.detail) if entry.detail else {} for key, entry in self.rows.items()
        }

    def _rows(self) -> Sequence[Any]:
        query = (
            select(
                steps.c.id,
                steps.c.node,
                steps.c.status,
                steps.c.due,
                steps.c.owner,
                steps.c.attempt,
                steps.c.deps_left,
                steps.c.queue,
                checkpoints.c.started_at,
                checkpoints.c.finished_at,
                checkpoints.c.attempts,
                checkpoints.c.detail,
            )
            .select_from(steps.outerjoin(checkpoints, checkpoints.c.step_id == steps.c.id))
            .where(steps.c.id >= self.low, steps.c.id < self.high)
            .order_by(steps.c.id)
            .limit(ROWS)
        )
        return self.connection.execute(query).all()

    def label(self, key: int) -> str:
        """Return the name of a row with its item: `build[3]`."""
        name, item = self.names[key]
        return name if item is None else f"{name}[{item}]"

    def expansion(self, key: int) -> tuple[int, int, int, str, int, int | None] | None:
        """Return the expansion that a row belongs to; see `Places`."""
        return next((entry for entry in self.places.parents if entry[0] <= key < entry[1]), None)

    def ready_at(self, key: int) -> datetime:
        """Return when the last predecessor of a row ended."""
        node = self.plan.nodes[self.rows[key].node]
        place = self.expansion(key)
        if place is None:
            before = [dep.node for dep in node.deps]
            ended: list[datetime | None] = [self.rows[row].finished_at for row in before if row in self.rows]
            began: datetime = self.run.key_at or self.run.created_at
            return max([began, *(moment for moment in ended if moment is not None)])
        base, end, parent, phase, turn, reduce = place
        known: list[datetime | None] = []
        if key == reduce:
            known = [self.rows[row].finished_at for row in range(base, end) if row != reduce and row in self.rows]
        elif phase == "steps":
            body = self.plan.nodes[self.rows[parent].node].bodies["steps"]
            known = [
                self.rows[base + body.index(dep.node)].finished_at
                for dep in node.deps
                if dep.node in body and base + body.index(dep.node) in self.rows
            ]
        elif phase == "body" and turn and base - 1 in self.rows:
            known = [self.rows[base - 1].finished_at]
        moments = [moment for moment in known if moment is not None]
        return max(moments) if moments else self.ready_at(parent)
