"""Read models of runs: the documented JSON shapes, read from the rows."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import Connection, Row, func, select

from gorgon_common import strict_json
from gorgon_common.clock import format_time
from gorgon_common.engine.records import ROW_BITS, ROW_MASK, step_id
from gorgon_common.engine.states import FINISHED_RUN, RunStatus, StepStatus
from gorgon_common.errors import InputInvalid, NotFound
from gorgon_common.persistence import concurrency
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.tables import (
    blobs,
    checkpoints,
    db_now,
    events,
    expansions,
    ledger,
    runs,
    steps,
    workers,
)
from gorgon_common.workflow.plan import Kind, Plan

MICRO = 1_000_000
_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})
_WAITING_EVENTS = ("step.retry", "step.waiting")


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

    def number(self, public_id: str) -> int:
        """Return a run's internal id.  Raises NotFound."""
        with self.database.read() as connection:
            found = connection.scalar(select(runs.c.id).where(runs.c.public_id == public_id))
        if found is None:
            raise NotFound(f"There is no run {public_id}.", hint="See: gorgon runs ls")
        return int(found)

    def public_id(self, number: int) -> str:
        """Return the public id of a run.  Raises NotFound."""
        with self.database.read() as connection:
            found = connection.scalar(select(runs.c.public_id).where(runs.c.id == number))
        if found is None:
            raise NotFound(f"There is no run number {number}.")
        return str(found)

    def run(self, public_id: str, *, with_steps: bool) -> dict[str, Any]:
        """Return one run.  Raises NotFound."""
        with self.database.read() as connection:
            row = connection.execute(select(runs).where(runs.c.public_id == public_id)).first()
            if row is None:
                raise NotFound(f"There is no run {public_id}.", hint="See: gorgon runs ls")
            view = _run(row, _spent(connection, [row.id]).get(row.id))
            if row.home and row.status not in FINISHED_RUN:
                view["orphaned"] = _abandoned(connection, row.home)
            waits = concurrency.waits_for(connection, row)
            if waits is not None:
                view["waits_for"] = waits
            if with_steps:
                plan, began = self.plan_of(row.plan_hash), row.key_at or row.created_at
                view["steps"] = _Steps(connection, row.id, plan, began=began).list()
        return view

    def runs(self, *, status: str | None, workflow: str | None, limit: int, cursor: str | None) -> dict[str, Any]:
        """Return `{items, next}`, newest first.  Raises InputInvalid for an unknown status or cursor."""
        query = select(runs).order_by(runs.c.id.desc()).limit(limit + 1)
        if status is not None:
            if status.upper() not in RunStatus.__members__:
                known = ", ".join(name.lower() for name in RunStatus.__members__)
                raise InputInvalid(f"There is no run status {status!r}.", hint=f"Use one of {known}.")
            query = query.where(runs.c.status == int(RunStatus[status.upper()]))
        if workflow is not None:
            query = query.where(runs.c.workflow == workflow)
        if cursor is not None:
            query = query.where(runs.c.id < _position(cursor))
        with self.database.read() as connection:
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

    def events(self, public_id: str, *, after: int, limit: int) -> list[dict[str, Any]]:
        """Return the run's journal after `after`, oldest first."""
        number = self.number(public_id)
        with self.database.read() as connection:
            rows = connection.execute(
                select(events)
                .where(events.c.run_id == number, events.c.seq > after)
                .order_by(events.c.seq)
                .limit(limit)
            ).all()
            if not rows:
                return []
            plan = self.plan_of(connection.execute(select(runs.c.plan_hash).where(runs.c.id == number)).scalar_one())
            names = _Steps(connection, number, plan).names({row.row for row in rows if row.row is not None})
            detail = _details(connection, number, [row.row for row in rows if row.row is not None])
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
                    "data": _said(row) or facts.get("data"),
                }
            )
        return found


_ENDED = frozenset({"step.failed", "step.skipped", "step.cancelled", "step.succeeded"})


def _said(event: Any) -> dict[str, Any] | None:
    """Return an event's data for machines.  For a parked step: what it waits for, and until when."""
    if event.data is None:
        return None
    data: dict[str, Any] = strict_json.loads_stored(event.data)
    if event.kind not in _WAITING_EVENTS:
        return data
    return {"why": data["why"], "until": format_time(event.at + timedelta(seconds=data["seconds"]))}


def _why(event: Any) -> Any:
    return strict_json.loads_stored(event.data)["why"] if event.data else None


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
        **_costs(spent),
        "tokens": {"input": int(spent.used_in) if spent else 0, "output": int(spent.used_out) if spent else 0},
        "team": row.team,
        "target": row.target,
        "trace_id": row.trace_id,
        "created_at": format_time(row.created_at),
        "started_at": _time(row.started_at),
        "finished_at": _time(row.finished_at),
    }


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)


def _costs(spent: Row[Any] | None) -> dict[str, Any]:
    """Return the costs in US dollars.

    The sum is None, never 0, if the cost of any call is unknown.  The known part and the number of such calls are
    beside it.
    """
    known = 0.0 if spent is None else int(spent.cost or 0) / MICRO
    unpriced = 0 if spent is None else int(spent.unpriced)
    return {"cost_usd": None if unpriced else known, "known_cost_usd": known, "unpriced_calls": unpriced}


_SUMS = (
    func.sum(ledger.c.input_tokens).label("used_in"),
    func.sum(ledger.c.output_tokens).label("used_out"),
    func.sum(ledger.c.cost_micro).label("cost"),
    (func.count() - func.count(ledger.c.cost_micro)).label("unpriced"),
    func.min(ledger.c.at).label("first"),
)


def _spent(connection: Connection, numbers: Iterable[int]) -> dict[int, Row[Any]]:
    """Return what runs have used so far."""
    found = {}
    for number in numbers:
        row = connection.execute(
            select(func.count().label("calls"), *_SUMS).where(
                ledger.c.step_id >= step_id(number, 0), ledger.c.step_id < step_id(number + 1, 0)
            )
        ).one()
        if row.calls:
            found[number] = row
    return found


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


class Places:
    """Maps the rows of one run to their composite, and to their item or iteration in it."""

    def __init__(self, connection: Connection, number: int, plan: Plan) -> None:
        self.connection = connection
        self.number = number
        self.plan = plan
        self.low, self.high = step_id(number, 0), step_id(number + 1, 0)
        self.parents = self._parents()

    def of(self, nodes: Mapping[int, int]) -> dict[int, tuple[str, int | None]]:
        """Return row → (the step's name, its item or iteration) for rows whose nodes are given."""
        return {row: (self._name(number), self._item(row)) for row, number in nodes.items()}

    def _parents(self) -> list[tuple[int, int, int, str, int, int | None]]:
        """Return (base, end, parent row, phase, round, reduce's row) of every expansion.

        `steps.parent` does not give this: a step that runs on after its group has ended is attached to the group's
        successor.
        """
        query = select(expansions).where(expansions.c.step_id >= self.low, expansions.c.step_id < self.high)
        return [
            (row.base, row.base + row.count, row.step_id & ROW_MASK, row.phase, row.round, row.reduce)
            for row in self.connection.execute(query.order_by(expansions.c.base))
        ]

    def _above(self, row: int) -> tuple[int, int | None] | None:
        """Return the composite that a row belongs to, and its item or iteration there."""
        for base, end, parent, phase, number, reduce in self.parents:
            if base <= row < end:
                item = phase == "item" and row != reduce
                position = row - base if item else number if phase == "body" else None
                return parent, position
        return None

    def _name(self, number: int) -> str:
        return self.plan.nodes[number].name

    def _item(self, row: int) -> int | None:
        """Return the item or iteration of a row, taken from the nearest composite that has any."""
        above = self._above(row)
        while above is not None:
            parent, position = above
            if position is not None:
                return position
            above = self._above(parent)
        return None


class _Steps(Places):
    """The steps of one run in their displayed form.  `began`: when its first steps could begin."""

    def __init__(self, connection: Connection, number: int, plan: Plan, *, began: datetime | None = None) -> None:
        super().__init__(connection, number, plan)
        self._began = began

    def names(self, rows: Iterable[int]) -> dict[int, str]:
        """Return row → the step's name with its items and iterations, such as `build[3]`."""
        wanted = [step_id(self.number, row) for row in rows]
        nodes = {
            row.id & ROW_MASK: row.node
            for start in range(0, len(wanted), 500)
            for row in self.connection.execute(
                select(steps.c.id, steps.c.node).where(steps.c.id.in_(wanted[start : start + 500]))
            )
        }
        found = {}
        for row, number in nodes.items():
            node = self.plan.nodes[number]
            if node.kind in _ENGINE:
                continue
            item = self._item(row)
            found[row] = self._name(number) if item is None else f"{self._name(number)}[{item}]"
        return found

    def list(self) -> list[dict[str, Any]]:
        """Return every step: those of the file in their order, each followed by its expansion."""
        rows = {row.id & ROW_MASK: row for row in self._rows()}
        spent = self._spent()
        waits = self._waits([key for key, row in rows.items() if row.status == StepStatus.WAITING])
        children: dict[int | None, list[int]] = {}
        for key in sorted(rows):
            above = self._above(key)
            children.setdefault(None if above is None else above[0], []).append(key)
        found: list[dict[str, Any]] = []

        def walk(parent: int | None) -> list[str]:
            """Add the rows under a row; return when its parts began."""
            begun: list[str] = []
            for key in children.get(parent, ()):
                told = waits.get(key) or (None, self._ready_waits(key, rows))
                view = self._view(key, rows[key], spent.get(key), *told)
                if self.plan.nodes[rows[key].node].kind not in _ENGINE:
                    found.append(view)
                inside = walk(key)
                if inside:
                    view["started_at"] = min(inside)
                if view["started_at"] is not None:
                    begun.append(view["started_at"])
            return begun

        walk(None)
        return found

    def _rows(self) -> Iterable[Any]:
        query = (
            select(
                steps.c.id,
                steps.c.node,
                steps.c.status,
                steps.c.attempt,
                steps.c.deps_left,
                checkpoints.c.attempts,
                checkpoints.c.started_at,
                checkpoints.c.finished_at,
                checkpoints.c.output,
                checkpoints.c.detail,
                blobs.c.body,
            )
            .select_from(
                steps.outerjoin(checkpoints, checkpoints.c.step_id == steps.c.id).outerjoin(
                    blobs, blobs.c.step_id == steps.c.id
                )
            )
            .where(steps.c.id >= self.low, steps.c.id < self.high)
        )
        return self.connection.execute(query).all()

    def _spent(self) -> dict[int, Row[Any]]:
        query = (
            select(
                ledger.c.step_id,
                *_SUMS,
                func.max(ledger.c.provider).label("provider"),
                func.max(ledger.c.model).label("model"),
                func.min(ledger.c.latency_ms).label("latency"),
            )
            .where(ledger.c.step_id >= self.low, ledger.c.step_id < self.high, ledger.c.provider != "none")
            .group_by(ledger.c.step_id)
        )
        return {row.step_id & ROW_MASK: row for row in self.connection.execute(query)}

    def _waits(self, rows: Sequence[int]) -> dict[int, tuple[str | None, dict[str, Any]]]:
        """Return row → (what it waits for, for people; `{why, since, until}`)."""
        if not rows:
            return {}
        query = (
            select(events.c.row, events.c.kind, events.c.at, events.c.message, events.c.data)
            .where(events.c.run_id == self.number, events.c.row.in_(rows), events.c.kind.in_(_WAITING_EVENTS))
            .order_by(events.c.seq)
        )
        last: dict[int, Any] = {}
        since: dict[int, datetime] = {}
        for row in self.connection.execute(query):
            before = last.get(row.row)
            # A step that asks the limiter again and has to wait again has waited since its first request.
            if before is None or row.kind == "step.retry" or _why(before) != _why(row):
                since[row.row] = row.at
            last[row.row] = row
        return {
            key: (row.message, {"since": format_time(since[key]), **(_said(row) or {})}) for key, row in last.items()
        }

    def _ready_waits(self, key: int, rows: Mapping[int, Any]) -> dict[str, Any] | None:
        """Return what a ready step of the file waits for: a worker, since its last predecessor ended."""
        row = rows[key]
        if row.status != StepStatus.READY or key >= self.plan.top:
            return None
        ended = [rows[dep.node].finished_at for dep in self.plan.nodes[row.node].deps if dep.node in rows]
        known = [moment for moment in (self._began, *ended) if moment is not None]
        return {"why": "queue", "since": format_time(max(known)), "until": None} if known else None

    def _view(
        self, key: int, row: Row[Any], spent: Row[Any] | None, reason: str | None, waits: dict[str, Any] | None
    ) -> dict[str, Any]:
        node = self.plan.nodes[row.node]
        detail: Mapping[str, Any] = strict_json.loads_stored(row.detail) if row.detail else {}
        body = row.body if row.body is not None else row.output
        status = StepStatus(row.status)
        if status is StepStatus.WAITING and row.deps_left:
            status = StepStatus.RUNNING  # its children are running
        above = self._above(key)
        started = row.started_at
        if spent is not None and row.attempts and row.attempts > 1:
            started = min(started or spent.first, spent.first - timedelta(milliseconds=spent.latency))
        return {
            "id": self._name(row.node),
            "item": self._item(key),
            "kind": node.kind.value,
            "role": node.spec.get("role"),
            "provider": detail.get("provider") or (spent.provider if spent else node.spec.get("provider")),
            "model": detail.get("model") or (spent.model if spent else node.spec.get("model") or None),
            "status": status.name.lower(),
            "reason": detail.get("reason") or reason,
            "waits": waits,
            "output": None if body is None else strict_json.loads_stored(body),
            "error": detail.get("error"),
            "attempts": row.attempts if row.attempts is not None else (row.attempt if row.status in _BEGUN else 0),
            "tokens": {"input": int(spent.used_in) if spent else 0, "output": int(spent.used_out) if spent else 0},
            **_costs(spent),
            "started_at": _time(started),
            "finished_at": _time(row.finished_at),
            "parent": None if above is None else self._name(self._node(above[0])),
            **{name: detail[name] for name in ("exit_code", "stderr", "adopted_from") if name in detail},
        }

    def _node(self, row: int) -> int:
        if row < self.plan.top:
            return row
        if not hasattr(self, "_nodes"):
            self._nodes: dict[int, int] = {entry.id & ROW_MASK: entry.node for entry in self._rows()}
        return self._nodes[row]


_BEGUN = frozenset({StepStatus.RUNNING, StepStatus.WAITING, StepStatus.IN_DOUBT})
assert ROW_BITS == 20
