"""Read models of runs: the documented JSON shapes, read from the rows."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Connection, Row, and_, func, literal_column, select
from sqlalchemy.sql.elements import ColumnElement

from gorgon_common import strict_json
from gorgon_common.clock import format_time
from gorgon_common.engine.records import ROW_BITS, ROW_MASK, step_id
from gorgon_common.engine.states import FINISHED_RUN, RunStatus
from gorgon_common.errors import InputInvalid, NotFound
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.queries.amounts import SUMS, costs, time_text
from gorgon_common.persistence.queries.keys import waits_for
from gorgon_common.persistence.queries.steps import Steps, waiting_data
from gorgon_common.persistence.tables import checkpoints, db_now, events, ledger, runs, workers
from gorgon_common.scope import Scope
from gorgon_common.workflow.plan import Plan

_ENDED = frozenset({"step.failed", "step.skipped", "step.cancelled", "step.succeeded"})


class Views:
    """Reads runs.  `plan_of` returns the plan with a given hash."""

    def __init__(self, database: Database, plan_of: Callable[[str], Plan]) -> None:
        self.database = database
        self.plan_of = plan_of

    def now(self) -> datetime:
        """Return the database's time: aware, UTC."""
        with self.database.read() as connection:
            moment: datetime = connection.execute(select(db_now())).scalar_one()
        return moment

    def number(self, scope: Scope, public_id: str) -> int:
        """Return a run's internal id.  Raises NotFound."""
        with self.database.read(scope) as connection:
            return int(find_run(connection, scope, public_id).id)

    def public_id(self, number: int) -> str:
        """Return the public id of a run.  Raises NotFound."""
        with self.database.read() as connection:
            found = connection.scalar(select(runs.c.public_id).where(runs.c.id == number))
        if found is None:
            raise NotFound(f"There is no run number {number}.")
        return str(found)

    def run(self, scope: Scope, public_id: str, *, with_steps: bool) -> dict[str, Any]:
        """Return one run; `waits_for` as of `keys.waits_for`.  Raises NotFound."""
        with self.database.read(scope) as connection:
            row = find_run(connection, scope, public_id)
            view = _run(row, _spent(connection, [row.id]).get(row.id))
            if row.home and row.status not in FINISHED_RUN:
                view["orphaned"] = _abandoned(connection, row.home)
            waits = waits_for(connection, row)
            if waits is not None:
                view["waits_for"] = waits
            if with_steps:
                view["steps"] = self._steps(connection, row).whole()
        return view

    def steps(self, scope: Scope, public_id: str, *, limit: int, cursor: int) -> dict[str, Any]:
        """Return `{items, next}`: a page of a run's steps, each followed by its items or iterations.

        `cursor`: 0, or `next` of the page before.  Raises NotFound.
        """
        with self.database.read(scope) as connection:
            row = find_run(connection, scope, public_id)
            items, following = self._steps(connection, row).page(limit, cursor)
        return {"items": items, "next": None if following is None else str(following)}

    def _steps(self, connection: Connection, run: Row[Any]) -> Steps:
        return Steps(connection, run.id, self.plan_of(run.plan_hash), began=run.key_at or run.created_at)

    def runs(
        self, scope: Scope, *, status: str | None, workflow: str | None, limit: int, cursor: str | None
    ) -> dict[str, Any]:
        """Return `{items, next}`, newest first.  Raises InputInvalid for an unknown status or cursor."""
        query = select(runs).where(runs.c.org_id == scope.org).order_by(runs.c.id.desc()).limit(limit + 1)
        if status is not None:
            if status.upper() not in RunStatus.__members__:
                known = ", ".join(name.lower() for name in RunStatus.__members__)
                raise InputInvalid(f"There is no run status {status!r}.", hint=f"Use one of {known}.")
            query = query.where(runs.c.status == int(RunStatus[status.upper()]))
        if workflow is not None:
            query = query.where(runs.c.workflow == workflow)
        if cursor is not None:
            query = query.where(runs.c.id < _position(cursor))
        with self.database.read(scope) as connection:
            rows = connection.execute(query).all()
            spent = _spent(connection, [row.id for row in rows])
            homes = {row.home for row in rows if row.home and row.status not in FINISHED_RUN}
            dead = {home for home in homes if _abandoned(connection, home)}
        items = [_run(row, spent.get(row.id)) for row in rows[:limit]]
        for row, item in zip(rows, items, strict=False):
            if row.home in homes and row.status not in FINISHED_RUN:
                item["orphaned"] = row.home in dead
        more = base64.urlsafe_b64encode(str(rows[limit - 1].id).encode()).decode() if len(rows) > limit else None
        return {"items": items, "next": more}

    def events(self, scope: Scope, public_id: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Return the run's journal after `after`, oldest first."""
        with self.database.read(scope) as connection:
            run = find_run(connection, scope, public_id)
            rows = connection.execute(
                select(events)
                .where(events.c.run_id == run.id, events.c.seq > after)
                .order_by(events.c.seq)
                .limit(limit)
            ).all()
            if not rows:
                return []
            steps = self._steps(connection, run)
            names = steps.labels({row.row for row in rows if row.row is not None})
            detail = _details(connection, run.id, [row.row for row in rows if row.row is not None])
        found = []
        for row in rows:
            known = names.get(row.row) if row.row is not None else None
            if row.row is not None and known is None:
                continue  # steps that the engine added
            facts = detail.get(row.row, {}) if row.kind in _ENDED else {}
            found.append(
                {
                    "seq": row.seq,
                    "at": format_time(row.at),
                    "kind": row.kind,
                    "step": known,
                    "message": row.message or facts.get("message"),
                    "data": waiting_data(row) or facts.get("data"),
                }
            )
        return found


def find_run(connection: Connection, scope: Scope, public_id: str) -> Row[Any]:
    """Return the row of a run of the caller's organisation.  Raises NotFound."""
    row = connection.execute(select(runs).where(runs.c.public_id == public_id, runs.c.org_id == scope.org)).first()
    if row is None:
        raise NotFound(f"There is no run {public_id}.", hint="See: gorgon runs ls")
    return row


def _abandoned(connection: Connection, home: str) -> bool:
    """Return whether the process of an embedded run has died."""
    alive = select(func.count()).where(workers.c.home == home, workers.c.lease_until > db_now())
    return not connection.scalar(alive)


def _position(cursor: str) -> int:
    try:
        position = int(base64.urlsafe_b64decode(cursor.encode()))
        if not 0 <= position < 1 << 63:
            raise ValueError(position)
        return position
    except ValueError:
        raise InputInvalid("The cursor is not valid.", hint="Use the `next` of the previous page.") from None


def _run(row: Row[Any], spent: Row[Any] | None) -> dict[str, Any]:
    return {
        "run_id": row.public_id,
        "workflow": row.workflow,
        "status": RunStatus(row.status).name.lower(),
        "outputs": strict_json.loads_stored(row.outputs) if row.outputs else None,
        "error": strict_json.loads_stored(row.error) if row.error else None,
        **costs(spent),
        "tokens": {"input": int(spent.used_in) if spent else 0, "output": int(spent.used_out) if spent else 0},
        "team": row.team,
        "target": row.target,
        "trace_id": row.trace_id,
        "created_at": format_time(row.created_at),
        "started_at": time_text(row.started_at),
        "finished_at": time_text(row.finished_at),
    }


def _spent(connection: Connection, numbers: Sequence[int]) -> dict[int, Row[Any]]:
    """Return what runs have used so far, those that have made calls."""
    # A range of the ledger's key for each run: only the calls of these runs are read.
    query = (
        select(runs.c.id, *SUMS)
        .select_from(runs.join(ledger, and_(ledger.c.step_id >= first_step(0), ledger.c.step_id < first_step(1))))
        .where(runs.c.id.in_(numbers))
        .group_by(runs.c.id)
    )
    return {row.id: row for row in connection.execute(query)}


def first_step(after: int) -> ColumnElement[int]:
    """Return the id of the first step of a run, or of the run `after` places behind it."""
    return (runs.c.id + after).op("<<", return_type=BigInteger())(literal_column(str(ROW_BITS)))


def _details(connection: Connection, number: int, rows: list[int]) -> dict[int, dict[str, Any]]:
    """Return row → message and data of the steps that have ended."""
    found = {}
    query = select(checkpoints.c.step_id, checkpoints.c.detail).where(
        checkpoints.c.step_id.in_([step_id(number, row) for row in rows]), checkpoints.c.detail.is_not(None)
    )
    for row in connection.execute(query):
        detail = strict_json.loads_stored(row.detail)
        message = (detail.get("error") or {}).get("message") or detail.get("reason") or detail.get("message")
        data = {key: detail[key] for key in ("provider", "model", "role", "exit_code") if key in detail}
        found[row.step_id & ROW_MASK] = {"message": message, "data": data or None}
    return found
