"""The steps of one run in their displayed form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import BigInteger, Connection, Row, Select, func, literal, select

from gorgon_common import strict_json
from gorgon_common.clock import format_time
from gorgon_common.engine.records import ROW_MASK, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence.queries.amounts import SUMS, costs, time_text
from gorgon_common.persistence.queries.places import ENGINE_KINDS, Places
from gorgon_common.persistence.tables import blobs, checkpoints, events, expansions, ledger, steps
from gorgon_common.workflow.plan import Plan

WAITING_EVENTS = ("step.retry", "step.waiting")
_BEGUN = frozenset({StepStatus.RUNNING, StepStatus.WAITING, StepStatus.IN_DOUBT})
_CHUNK = 500
"""Maximum number of ids in one query."""


def waiting_data(event: Any) -> dict[str, Any] | None:
    """Return an event's data for machines.  For a parked step: what it waits for, and until when."""
    if event.data is None:
        return None
    data: dict[str, Any] = strict_json.loads_stored(event.data)
    if event.kind not in WAITING_EVENTS:
        return data
    return {"why": data["why"], "until": format_time(event.at + timedelta(seconds=data["seconds"]))}


class Steps(Places):
    """Reads steps.  `began`: when the first steps of the run could begin."""

    def __init__(self, connection: Connection, number: int, plan: Plan, *, began: datetime | None = None) -> None:
        super().__init__(connection, number, plan)
        self._began = began
        self._nodes: dict[int, int] = {}

    def labels(self, rows: Iterable[int]) -> dict[int, str]:
        """Return row → the step's name with its items and iterations, such as `build[3]`."""
        found = {}
        for row, number in self._nodes_of(rows).items():
            node = self.plan.nodes[number]
            if node.kind in ENGINE_KINDS:
                continue
            item = self._item(row)
            found[row] = self._name(number) if item is None else f"{self._name(number)}[{item}]"
        return found

    def whole(self) -> list[dict[str, Any]]:
        """Return every step: those of the file in their order, each followed by its expansion."""
        rows = self._read(_STEPS.where(steps.c.id >= self.low, steps.c.id < self.high))
        spent = self._spent([ledger.c.step_id >= self.low, ledger.c.step_id < self.high])
        order = [row for row in self.walk() if row in rows]
        begun: dict[int, datetime] = {}
        for row in reversed(order):  # the parts of a composite follow it
            above, moment = self._above(row), begun.get(row) or _started(rows[row], spent.get(row))
            if above is not None and moment is not None:
                begun[above[0]] = min(begun.get(above[0], moment), moment)
        return self._views(order, rows, spent, begun)

    def page(self, limit: int, start: int) -> tuple[list[dict[str, Any]], int | None]:
        """Return `limit` steps of the list, and where the next page starts; None at the end.

        `start`: 0, or what the page before returned.  Reads no more steps than it returns, except for the engine's own.
        """
        order: list[int] = []
        rows: dict[int, Row[Any]] = {}
        position, following = start, None
        ahead = islice(self.walk(), start, None)
        while following is None:
            part = list(islice(ahead, limit + 1))
            if not part:
                break
            found = self._read(*(_STEPS.where(steps.c.id.in_(ids)) for ids in self._ids(part)))
            for row in part:
                if row in found and self.plan.nodes[found[row].node].kind not in ENGINE_KINDS:
                    if len(order) == limit:
                        following = position
                        break
                    order.append(row)
                    rows[row] = found[row]
                position += 1
        spent: dict[int, Row[Any]] = {}
        for ids in self._ids(order):
            spent |= self._spent([ledger.c.step_id.in_(ids)])
        return self._views(order, rows, spent, self._begun(order)), following

    def _ids(self, rows: Sequence[int]) -> Iterable[Sequence[int]]:
        """Yield the ids of rows, as many as one query may name."""
        for first in range(0, len(rows), _CHUNK):
            yield [step_id(self.number, row) for row in rows[first : first + _CHUNK]]

    def _read(self, *queries: Select[Any]) -> dict[int, Row[Any]]:
        rows = {row.id & ROW_MASK: row for query in queries for row in self.connection.execute(query)}
        self._nodes |= {key: row.node for key, row in rows.items()}
        return rows

    def _nodes_of(self, rows: Iterable[int]) -> dict[int, int]:
        """Return row → node of those of the rows that exist."""
        wanted = list(rows)
        for ids in self._ids([row for row in wanted if row not in self._nodes]):
            query = select(steps.c.id, steps.c.node).where(steps.c.id.in_(ids))
            self._nodes |= {row.id & ROW_MASK: row.node for row in self.connection.execute(query)}
        return {row: self._nodes[row] for row in wanted if row in self._nodes}

    def _spent(self, chosen: Sequence[Any]) -> dict[int, Row[Any]]:
        query = (
            select(
                ledger.c.step_id,
                *SUMS,
                func.max(ledger.c.provider).label("provider"),
                func.max(ledger.c.model).label("model"),
                func.min(ledger.c.latency_ms).label("latency"),
            )
            .where(*chosen, ledger.c.provider != "none")
            .group_by(ledger.c.step_id)
        )
        return {row.step_id & ROW_MASK: row for row in self.connection.execute(query)}

    def _begun(self, rows: Sequence[int]) -> dict[int, datetime]:
        """Return when the parts of composites began: of those of the rows that have any."""
        inside = (
            select(expansions.c.step_id.label("top"), expansions.c.base, expansions.c.count)
            .where(expansions.c.step_id.in_([step_id(self.number, row) for row in rows]))
            .cte("inside", recursive=True)
        )
        low = literal(self.low, BigInteger)
        inner = inside.alias()
        inside = inside.union_all(
            select(inner.c.top, expansions.c.base, expansions.c.count).where(
                expansions.c.step_id >= low + inner.c.base, expansions.c.step_id < low + inner.c.base + inner.c.count
            )
        )
        part = checkpoints.c.step_id
        within = [part >= low + inside.c.base, part < low + inside.c.base + inside.c.count]
        composite = select(literal(1)).where(expansions.c.step_id == part).exists()
        first = (
            select(inside.c.top, func.min(checkpoints.c.started_at).label("at"))
            .where(*within, ~composite)
            .group_by(inside.c.top)
        )
        found = {row.top & ROW_MASK: row.at for row in self.connection.execute(first) if row.at is not None}
        retried = (
            select(inside.c.top, func.min(ledger.c.at).label("first"), func.min(ledger.c.latency_ms).label("latency"))
            .where(*within, ~composite, checkpoints.c.attempts > 1, ledger.c.step_id == part)
            .where(ledger.c.provider != "none")
            .group_by(inside.c.top, part)
        )
        for row in self.connection.execute(retried):
            key, moment = row.top & ROW_MASK, row.first - timedelta(milliseconds=row.latency)
            found[key] = min(found.get(key, moment), moment)
        return found

    def _waits(self, rows: Sequence[int]) -> dict[int, tuple[str | None, dict[str, Any]]]:
        """Return row → (what it waits for, for people; `{why, since, until}`)."""
        if not rows:
            return {}
        query = (
            select(events.c.row, events.c.kind, events.c.at, events.c.message, events.c.data)
            .where(events.c.run_id == self.number, events.c.row.in_(rows), events.c.kind.in_(WAITING_EVENTS))
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
            key: (row.message, {"since": format_time(since[key]), **(waiting_data(row) or {})})
            for key, row in last.items()
        }

    def _ready_since(self, ready: Sequence[int], rows: Mapping[int, Row[Any]]) -> dict[int, datetime]:
        """Return row → when the last predecessor of a ready step of the file ended."""
        before = {key: [dep.node for dep in self.plan.nodes[rows[key].node].deps] for key in ready}
        ended = {key: row.finished_at for key, row in rows.items()}
        other = [row for row in dict.fromkeys(row for needs in before.values() for row in needs) if row not in ended]
        for ids in self._ids(other):
            query = select(checkpoints.c.step_id, checkpoints.c.finished_at).where(checkpoints.c.step_id.in_(ids))
            ended |= {row.step_id & ROW_MASK: row.finished_at for row in self.connection.execute(query)}
        found = {}
        for key, needs in before.items():
            moments = [moment for moment in (self._began, *map(ended.get, needs)) if moment is not None]
            if moments:
                found[key] = max(moments)
        return found

    def _views(
        self,
        order: Sequence[int],
        rows: Mapping[int, Row[Any]],
        spent: Mapping[int, Row[Any]],
        begun: Mapping[int, datetime],
    ) -> list[dict[str, Any]]:
        """Return the steps among rows.  `begun`: when the parts of composites began."""
        waits = self._waits([key for key in order if rows[key].status == StepStatus.WAITING])
        ready = [key for key in order if rows[key].status == StepStatus.READY and key < self.plan.top]
        since = self._ready_since(ready, rows)
        parents = {key: above[0] for key in order if (above := self._above(key)) is not None}
        names = {row: self._name(node) for row, node in self._nodes_of(set(parents.values())).items()}
        found = []
        for key in order:
            if self.plan.nodes[rows[key].node].kind in ENGINE_KINDS:
                continue
            reason, waiting = waits.get(key, (None, None))
            if key in since:
                waiting = {"why": "queue", "since": format_time(since[key]), "until": None}
            started = begun.get(key) or _started(rows[key], spent.get(key))
            view = self._view(key, rows[key], spent.get(key), reason)
            view |= {"waits": waiting, "started_at": time_text(started), "parent": names.get(parents.get(key, -1))}
            found.append(view)
        return found

    def _view(self, key: int, row: Row[Any], spent: Row[Any] | None, reason: str | None) -> dict[str, Any]:
        node = self.plan.nodes[row.node]
        detail: Mapping[str, Any] = strict_json.loads_stored(row.detail) if row.detail else {}
        body = row.body if row.body is not None else row.output
        status = StepStatus(row.status)
        if status is StepStatus.WAITING and row.deps_left:
            status = StepStatus.RUNNING  # its children are running
        return {
            "id": self._name(row.node),
            "item": self._item(key),
            "kind": node.kind.value,
            "role": node.spec.get("role"),
            "provider": detail.get("provider") or (spent.provider if spent else node.spec.get("provider")),
            "model": detail.get("model") or (spent.model if spent else node.spec.get("model") or None),
            "status": status.name.lower(),
            "reason": detail.get("reason") or reason,
            "waits": None,
            "output": None if body is None else strict_json.loads_stored(body),
            "error": detail.get("error"),
            "attempts": row.attempts if row.attempts is not None else (row.attempt if row.status in _BEGUN else 0),
            "tokens": {"input": int(spent.used_in) if spent else 0, "output": int(spent.used_out) if spent else 0},
            **costs(spent),
            "started_at": None,
            "finished_at": time_text(row.finished_at),
            "parent": None,
            **{name: detail[name] for name in ("exit_code", "stderr", "adopted_from") if name in detail},
        }


def _started(row: Row[Any], spent: Row[Any] | None) -> datetime | None:
    """Return when a step began: its first attempt, which its calls show."""
    started: datetime | None = row.started_at
    if spent is not None and row.attempts and row.attempts > 1:
        first: datetime = spent.first
        return min(started or first, first - timedelta(milliseconds=spent.latency))
    return started


def _why(event: Any) -> Any:
    return strict_json.loads_stored(event.data)["why"] if event.data else None


_STEPS = select(
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
).select_from(
    steps.outerjoin(checkpoints, checkpoints.c.step_id == steps.c.id).outerjoin(blobs, blobs.c.step_id == steps.c.id)
)
