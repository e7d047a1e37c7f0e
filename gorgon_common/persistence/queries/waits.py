"""What the steps of a run wait for, and until when.  Each wait has a class and its facts; `application` words them."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from sqlalchemy import and_, func, or_, select

from gorgon_common import queues, strict_json
from gorgon_common.clock import format_time
from gorgon_common.engine import limits, outcomes
from gorgon_common.engine.states import FINISHED_RUN, FINISHED_STEP, RunStatus, StepStatus
from gorgon_common.operations.providers import DIMENSIONS
from gorgon_common.persistence import max_parallel
from gorgon_common.persistence.queries.amounts import MICRO, time_text
from gorgon_common.persistence.queries.places import run_of
from gorgon_common.persistence.queries.reading import SHOWN, Reading
from gorgon_common.persistence.tables import backlog, budget_periods, budget_waits, db_now, events, runs, steps, workers

_WAITS = ("step.retry", "step.waiting")
_CLASSES = {
    **{reason: reason for reason in outcomes.REASONS},
    **dict.fromkeys((*DIMENSIONS, limits.RETRY_AFTER), "quota"),
    limits.UNREACHABLE: "limiter",
}
"""Stored reason of a wait → the class shown to people."""


class Waits:
    """Explains why steps have not ended."""

    def __init__(self, read: Reading) -> None:
        self.read = read
        self.held = max_parallel.held(read.connection, read.run.id) if read.run.max_parallel is not None else set()

    def waits(self, key: int) -> bool:
        """Return whether a row waits for something that needs an explanation."""
        row = self.read.rows[key]
        if StepStatus(row.status) in FINISHED_STEP or RunStatus(self.read.run.status) in FINISHED_RUN:
            return False
        # A composite that waits for its children needs no explanation of its own: its children have one.
        return not (row.status == StepStatus.WAITING and row.deps_left)

    def explain(self, key: int) -> dict[str, Any]:
        """Return `{step, item, status, since, until, why, facts, …}` of a row that waits.

        `why`: its class; `facts`: what a sentence about it needs, see `application.explanations`.
        """
        row = self.read.rows[key]
        match StepStatus(row.status):
            case StepStatus.PENDING:
                told = self._pending(key)
            case StepStatus.READY:
                told = self._ready(key)
            case StepStatus.RUNNING:
                told = self._running(key)
            case StepStatus.WAITING:
                told = self._parked(key)
            case _:
                told = {"why": "in_doubt"}
        name, item = self.read.names[key]
        return {
            "step": name,
            "item": item,
            "status": StepStatus(row.status).name.lower(),
            "since": None,
            "until": None,
            "facts": {},
            **told,
        }

    def _pending(self, key: int) -> dict[str, Any]:
        on = self._unfinished_before(key)
        if not on:
            parent = self._parent(key)
            limit = (
                None if parent is None else self.read.plan.nodes[self.read.rows[parent].node].spec.get("max_parallel")
            )
            limit = limit or self.read.plan.limits.get("max_parallel")
            return {"why": "max_parallel", "facts": {"limit": limit}, "since": self._ready_since(key)}
        names = list(dict.fromkeys(self.read.label(other) for other in on))
        ends = [self._expected_end(other) for other in on]
        known = [end for end in ends if end is not None]
        return {
            "why": "dependency",
            "facts": {"names": names},
            "on": names[:SHOWN],
            "since": format_time(self.read.run.created_at),
            "until": format_time(max(known)) if known and len(known) == len(ends) else None,
        }

    def _unfinished_before(self, key: int) -> list[int]:
        """Return the rows that a pending row waits for."""
        node = self.read.plan.nodes[self.read.rows[key].node]
        place = self.read.expansion(key)
        if place is None:
            before: Iterable[int] = (dep.node for dep in node.deps)
        else:
            base, end, parent, phase, _, reduce = place
            if key == reduce:
                before = (row for row in range(base, end) if row != reduce)
            elif phase == "steps":
                body = self.read.plan.nodes[self.read.rows[parent].node].bodies["steps"]
                before = (base + body.index(dep.node) for dep in node.deps if dep.node in body)
            else:
                before = ()
        return [row for row in before if row in self.read.rows and not self._finished(row)]

    def _parent(self, key: int) -> int | None:
        place = self.read.expansion(key)
        return None if place is None else place[2]

    def _finished(self, key: int) -> bool:
        return StepStatus(self.read.rows[key].status) in FINISHED_STEP

    def _ready(self, key: int) -> dict[str, Any]:
        row = self.read.rows[key]
        since = self._ready_since(key)
        if not self.read.run.active:
            return {"why": "paused", "since": since}
        if row.id in self.held:
            return {"why": "max_parallel", "facts": {"run_limit": self.read.run.max_parallel}, "since": since}
        name = queues.ALL[row.queue]
        served = self._served(row.queue)
        place = self._backlog(row)
        told = {"since": since, "queue": {"name": name, **served, "ahead": place}}
        if not served["workers"]:
            return {**told, "why": "no_worker", "facts": {"embedded": bool(self.read.run.home)}}
        if place is None:
            return {**told, "why": "queue"}
        return {**told, "why": "backlog", "until": self._turn(row, place, served["slots"])}

    def _turn(self, row: Any, place: int, slots: int) -> str | None:
        """Estimate when a step's turn comes, from the typical duration of such steps."""
        takes = self._typical(row.node)
        return None if takes is None else format_time(self.read.now + timedelta(seconds=takes * (place // slots + 1)))

    def _served(self, queue: int) -> dict[str, int]:
        live = self.read.connection.execute(
            select(workers.c.id, workers.c.queues, workers.c.slots).where(
                workers.c.target == self.read.run.target,
                workers.c.home == self.read.run.home,
                workers.c.lease_until > db_now(),
            )
        ).all()
        serving = [worker for worker in live if str(queue) in worker.queues.split(",")]
        busy = 0
        if serving:
            busy = (
                self.read.connection.scalar(
                    select(func.count())
                    .select_from(steps)
                    .where(
                        steps.c.owner.in_([worker.id for worker in serving]), steps.c.status == int(StepStatus.RUNNING)
                    )
                )
                or 0
            )
        return {"workers": len(serving), "slots": sum(worker.slots for worker in serving), "busy": int(busy)}

    def _backlog(self, row: Any) -> int | None:
        """Return how many steps are ahead of this one on the backlog; None if it is not there."""
        mine = self.read.connection.execute(
            select(backlog.c.rank).where(backlog.c.queue == row.queue, backlog.c.step_id == row.id)
        ).first()
        if mine is None:
            return None
        before = or_(backlog.c.rank < mine.rank, and_(backlog.c.rank == mine.rank, backlog.c.step_id < row.id))
        return int(
            self.read.connection.scalar(
                select(func.count())
                .select_from(backlog.join(runs, runs.c.id == run_of(backlog.c.step_id)))
                .where(
                    backlog.c.queue == row.queue,
                    runs.c.target == self.read.run.target,
                    runs.c.home == self.read.run.home,
                    runs.c.active,
                    before,
                )
            )
            or 0
        )

    def _running(self, key: int) -> dict[str, Any]:
        row = self.read.rows[key]
        worker = self.read.connection.execute(
            select(workers.c.name, workers.c.lease_until).where(workers.c.id == row.owner)
        ).first()
        end = self._expected_end(key)
        told = {"since": self._ready_since(key), "until": None if end is None else format_time(end)}
        if worker is None or worker.lease_until <= self.read.now:
            return {**told, "why": "lost_worker"}
        return {**told, "why": "running", "facts": {"worker": worker.name, "attempt": row.attempt}}

    def _parked(self, key: int) -> dict[str, Any]:
        row = self.read.rows[key]
        event = self._last_event(key)
        told: dict[str, Any] = {
            "facts": {"message": None if event is None else event.message, "attempt": row.attempt},
            "since": None if event is None else format_time(event.at),
            "until": time_text(row.due),
        }
        reason = str(strict_json.loads_stored(event.data)["why"]) if event is not None and event.data else ""
        told["reason"] = reason or None
        if reason == outcomes.RETRY:
            return {**told, "why": "retry"}
        budget = self._budget(row.id)
        if budget is not None:
            return {**told, "why": "budget", "budget": budget}
        return {**told, "why": _CLASSES.get(reason, "waiting")}

    def _budget(self, key: int) -> dict[str, Any] | None:
        """Return the account that a step waits for, and the room that it needs."""
        row = self.read.connection.execute(
            select(budget_waits, budget_periods)
            .select_from(budget_waits.join(budget_periods, budget_periods.c.id == budget_waits.c.period_id))
            .where(budget_waits.c.step_id == key)
        ).first()
        if row is None:
            return None
        left = None
        if row.usd_limit is not None:
            left = (row.usd_limit - row.usd_spent - row.usd_overrun - row.usd_reserved) / MICRO
        return {
            "name": row.label,
            "needs_usd": row.usd / MICRO,
            "left_usd": left,
            "needs_tokens": row.tokens,
            "ends_at": time_text(row.ends_at),
        }

    def _last_event(self, key: int) -> Any:
        return self.read.connection.execute(
            select(events.c.at, events.c.message, events.c.data)
            .where(events.c.run_id == self.read.run.id, events.c.row == key, events.c.kind.in_(_WAITS))
            .order_by(events.c.seq.desc())
            .limit(1)
        ).first()

    def _ready_since(self, key: int) -> str:
        return format_time(self.read.ready_at(key))

    def _typical(self, node: int) -> float | None:
        """Return how many seconds such a step took in past runs; None if that is unknown."""
        known = self.read.history.steps.get(self.read.plan.nodes[node].id)
        values = [] if known is None else known.seconds or known.took
        return median(values) if values else None

    def _expected_end(self, key: int) -> datetime | None:
        row = self.read.rows[key]
        takes = self._typical(row.node)
        if takes is None or StepStatus(row.status) is not StepStatus.RUNNING:
            return None
        return max(self.read.now, self.read.ready_at(key) + timedelta(seconds=takes))
