"""Explains the state of a run or step: what it waits for, what the money was spent on, how long each part took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from statistics import median
from typing import Any

from sqlalchemy import Connection, and_, func, or_, select

from gorgon_common import queues, strict_json
from gorgon_common.clock import format_time
from gorgon_common.costs.history import History
from gorgon_common.engine import limits, outcomes
from gorgon_common.engine.records import ROW_MASK, step_id
from gorgon_common.engine.states import FINISHED_RUN, FINISHED_STEP, RunStatus, StepStatus
from gorgon_common.errors import NotFound
from gorgon_common.operations.providers import DIMENSIONS
from gorgon_common.persistence import concurrency, max_parallel
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.history import read_history
from gorgon_common.persistence.reports import run_of
from gorgon_common.persistence.tables import (
    backlog,
    budget_periods,
    budget_waits,
    checkpoints,
    db_now,
    events,
    ledger,
    runs,
    steps,
    workers,
)
from gorgon_common.persistence.views import MICRO, Places
from gorgon_common.workflow.plan import Kind, Plan

SHOWN = 50
"""The maximum number of steps listed one by one; the rest are counted."""
ROWS = 20_000

_ENGINE = frozenset({Kind.GATE, Kind.FINALLY, Kind.END})
_WAITS = ("step.retry", "step.waiting")
_CLASSES = {
    **{reason: reason for reason in outcomes.REASONS},
    **dict.fromkeys((*DIMENSIONS, limits.RETRY_AFTER), "quota"),
    limits.UNREACHABLE: "limiter",
}
"""Stored reason of a wait → the class shown to people."""


class Explanations:
    """Explains runs.  `plan_of` returns the plan with a given hash."""

    def __init__(self, database: Database, plan_of: Callable[[str], Plan]) -> None:
        self.database = database
        self.plan_of = plan_of

    def explain(self, public_id: str, step: str | None = None) -> dict[str, Any]:
        """Return `{run_id, …, waiting, waiting_for, money, time}` for the whole run or for the steps with one name.

        The shape is described in docs/costs.md.  `step`: a name, or `name[3]` for one item.  Raises NotFound.
        """
        with self.database.read() as connection:
            row = connection.execute(select(runs).where(runs.c.public_id == public_id)).first()
            if row is None:
                raise NotFound(f"There is no run {public_id}.", hint="See: gorgon runs ls")
            plan = self.plan_of(row.plan_hash)
        history = read_history(self.database, self.plan_of, workflow=row.workflow, target=row.target)
        with self.database.read() as connection:
            return _Explanation(connection, row, plan, history).document(step)


class _Explanation:
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
        self.held = max_parallel.held(connection, run.id) if run.max_parallel is not None else set()
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

    def document(self, step: str | None) -> dict[str, Any]:
        """Return the whole document."""
        wanted = self._wanted(step)
        calls = [call for call in self._calls() if call.step_id & ROW_MASK in wanted]
        waits = concurrency.waits_for(self.connection, self.run)
        waiting = [_of_the_run(self._wait(key), waits) for key in sorted(wanted) if self._waits(key)]
        return {
            "run_id": self.run.public_id,
            "workflow": self.run.workflow,
            "team": self.run.team,
            "target": self.run.target,
            "status": RunStatus(self.run.status).name.lower(),
            "step": step,
            "as_of": format_time(self.now),
            "created_at": format_time(self.run.created_at),
            "started_at": _time(self.run.started_at),
            "finished_at": _time(self.run.finished_at),
            "waits_for": waits,
            "waiting_for": dict(Counter(str(entry["why"]) for entry in waiting)),
            "waiting": waiting[:SHOWN],
            "money": self._money(calls, wanted),
            "time": self._times(calls, wanted),
        }

    def _wanted(self, step: str | None) -> set[int]:
        shown = {key for key, entry in self.rows.items() if self.plan.nodes[entry.node].kind not in _ENGINE}
        if step is None:
            return shown
        found = {key for key in shown if step in (self.names[key][0], self._label(key))}
        if not found:
            names = dict.fromkeys(self.names[key][0] for key in sorted(shown))
            raise NotFound(f"The run has no step {step!r}.", hint=f"Its steps: {', '.join(names)}.")
        return found

    def _label(self, key: int) -> str:
        name, item = self.names[key]
        return name if item is None else f"{name}[{item}]"

    # What it waits for

    def _waits(self, key: int) -> bool:
        row = self.rows[key]
        if StepStatus(row.status) in FINISHED_STEP or RunStatus(self.run.status) in FINISHED_RUN:
            return False
        # A composite that waits for its children needs no explanation of its own: its children have one.
        return not (row.status == StepStatus.WAITING and row.deps_left)

    def _wait(self, key: int) -> dict[str, Any]:
        row = self.rows[key]
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
                told = {"why": "in_doubt", "what": "it is unknown whether its effect has happened"}
        name, item = self.names[key]
        return {
            "step": name,
            "item": item,
            "status": StepStatus(row.status).name.lower(),
            "since": None,
            "until": None,
            **told,
        }

    def _pending(self, key: int) -> dict[str, Any]:
        on = self._unfinished_before(key)
        if not on:
            parent = self._parent(key)
            limit = None if parent is None else self.plan.nodes[self.rows[parent].node].spec.get("max_parallel")
            limit = limit or self.plan.limits.get("max_parallel")
            what = f"at most {limit} run at the same time" if limit else "its turn has not come"
            return {"why": "max_parallel", "what": what, "since": self._ready_since(key)}
        names = list(dict.fromkeys(self._label(other) for other in on))
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        ends = [self._expected_end(other) for other in on]
        known = [end for end in ends if end is not None]
        return {
            "why": "dependency",
            "what": f"waits for {shown}",
            "on": names[:SHOWN],
            "since": format_time(self.run.created_at),
            "until": format_time(max(known)) if known and len(known) == len(ends) else None,
        }

    def _unfinished_before(self, key: int) -> list[int]:
        """Return the rows that a pending row waits for."""
        node = self.plan.nodes[self.rows[key].node]
        place = self._expansion(key)
        if place is None:
            before: Iterable[int] = (dep.node for dep in node.deps)
        else:
            base, end, parent, phase, _, reduce = place
            if key == reduce:
                before = (row for row in range(base, end) if row != reduce)
            elif phase == "steps":
                body = self.plan.nodes[self.rows[parent].node].bodies["steps"]
                before = (base + body.index(dep.node) for dep in node.deps if dep.node in body)
            else:
                before = ()
        return [row for row in before if row in self.rows and not self._finished(row)]

    def _expansion(self, key: int) -> tuple[int, int, int, str, int, int | None] | None:
        return next((entry for entry in self.places.parents if entry[0] <= key < entry[1]), None)

    def _parent(self, key: int) -> int | None:
        place = self._expansion(key)
        return None if place is None else place[2]

    def _finished(self, key: int) -> bool:
        return StepStatus(self.rows[key].status) in FINISHED_STEP

    def _ready(self, key: int) -> dict[str, Any]:
        row = self.rows[key]
        since = self._ready_since(key)
        if not self.run.active:
            return {"why": "paused", "what": "the run starts no new steps", "since": since}
        if row.id in self.held:
            full = f"the run already has as many steps under way as its `max_parallel` allows ({self.run.max_parallel})"
            return {"why": "max_parallel", "what": full, "since": since}
        name = queues.ALL[row.queue]
        served = self._served(row.queue)
        place = self._backlog(row)
        told = {"since": since, "queue": {"name": name, **served, "ahead": place}}
        if not served["workers"]:
            where = "the process of the run has died" if self.run.home else f"no worker serves the queue {name}"
            hint = (
                f"continue it with: gorgon runs resume {self.run.public_id}"
                if self.run.home
                else f"start one with: gorgon worker -q {name}"
            )
            if self.run.target == "live" and not self.run.home:
                hint += " --live"
            return {**told, "why": "no_worker", "what": f"{where}; {hint}"}
        busy = f"{served['busy']} of {served['slots']} slots of the queue {name} are taken"
        if place is None:
            return {**told, "why": "queue", "what": f"its message has been sent; {busy}"}
        return {
            **told,
            "why": "backlog",
            "what": f"{place} {'step is' if place == 1 else 'steps are'} ahead of it; {busy}",
            "until": self._turn(row, place, served["slots"]),
        }

    def _turn(self, row: Any, place: int, slots: int) -> str | None:
        """Estimate when a step's turn comes, from the typical duration of such steps."""
        takes = self._typical(row.node)
        return None if takes is None else format_time(self.now + timedelta(seconds=takes * (place // slots + 1)))

    def _served(self, queue: int) -> dict[str, int]:
        live = self.connection.execute(
            select(workers.c.id, workers.c.queues, workers.c.slots).where(
                workers.c.target == self.run.target,
                workers.c.home == self.run.home,
                workers.c.lease_until > db_now(),
            )
        ).all()
        serving = [worker for worker in live if str(queue) in worker.queues.split(",")]
        busy = 0
        if serving:
            busy = (
                self.connection.scalar(
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
        mine = self.connection.execute(
            select(backlog.c.rank).where(backlog.c.queue == row.queue, backlog.c.step_id == row.id)
        ).first()
        if mine is None:
            return None
        before = or_(backlog.c.rank < mine.rank, and_(backlog.c.rank == mine.rank, backlog.c.step_id < row.id))
        return int(
            self.connection.scalar(
                select(func.count())
                .select_from(backlog.join(runs, runs.c.id == run_of(backlog.c.step_id)))
                .where(
                    backlog.c.queue == row.queue,
                    runs.c.target == self.run.target,
                    runs.c.home == self.run.home,
                    runs.c.active,
                    before,
                )
            )
            or 0
        )

    def _running(self, key: int) -> dict[str, Any]:
        row = self.rows[key]
        worker = self.connection.execute(
            select(workers.c.name, workers.c.lease_until).where(workers.c.id == row.owner)
        ).first()
        end = self._expected_end(key)
        told = {"since": self._ready_since(key), "until": None if end is None else format_time(end)}
        if worker is None or worker.lease_until <= self.now:
            return {**told, "why": "lost_worker", "what": "its worker is gone; another worker takes the step over"}
        return {**told, "why": "running", "what": f"runs on {worker.name}, attempt {row.attempt}"}

    def _parked(self, key: int) -> dict[str, Any]:
        row = self.rows[key]
        event = self._last_event(key)
        message = event.message if event is not None and event.message else "no reason is recorded"
        told: dict[str, Any] = {
            "what": message,
            "since": None if event is None else format_time(event.at),
            "until": _time(row.due),
        }
        reason = str(strict_json.loads_stored(event.data)["why"]) if event is not None and event.data else ""
        told["reason"] = reason or None
        if reason == outcomes.RETRY:
            return {**told, "why": "retry", "what": f"attempt {row.attempt} comes next; the last one failed: {message}"}
        budget = self._budget(row.id)
        if budget is not None:
            return {**told, "why": "budget", "budget": budget}
        return {**told, "why": _CLASSES.get(reason, "waiting")}

    def _budget(self, key: int) -> dict[str, Any] | None:
        """Return the account that a step waits for, and the room that it needs."""
        row = self.connection.execute(
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
            "ends_at": _time(row.ends_at),
        }

    def _last_event(self, key: int) -> Any:
        return self.connection.execute(
            select(events.c.at, events.c.message, events.c.data)
            .where(events.c.run_id == self.run.id, events.c.row == key, events.c.kind.in_(_WAITS))
            .order_by(events.c.seq.desc())
            .limit(1)
        ).first()

    def _ready_since(self, key: int) -> str:
        return format_time(self._ready_at(key))

    def _ready_at(self, key: int) -> datetime:
        """Return when the last predecessor of a row ended."""
        node = self.plan.nodes[self.rows[key].node]
        place = self._expansion(key)
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
        return max(moments) if moments else self._ready_at(parent)

    def _typical(self, node: int) -> float | None:
        """Return how many seconds such a step took in past runs; None if that is unknown."""
        known = self.history.steps.get(self.plan.nodes[node].id)
        values = [] if known is None else known.seconds or known.took
        return median(values) if values else None

    def _expected_end(self, key: int) -> datetime | None:
        row = self.rows[key]
        takes = self._typical(row.node)
        if takes is None or StepStatus(row.status) is not StepStatus.RUNNING:
            return None
        return max(self.now, self._ready_at(key) + timedelta(seconds=takes))

    # What the money was spent on

    def _calls(self) -> Sequence[Any]:
        return self.connection.execute(
            select(ledger)
            .where(ledger.c.step_id >= self.low, ledger.c.step_id < self.high, ledger.c.provider != "none")
            .order_by(ledger.c.step_id, ledger.c.token, ledger.c.ordinal)
        ).all()

    def _money(self, calls: Sequence[Any], wanted: set[int]) -> dict[str, Any]:
        groups: dict[str, list[Any]] = {}
        listed: dict[int, list[dict[str, Any]]] = {}
        for call, kind in zip(calls, _kinds(calls), strict=True):
            groups.setdefault(kind, []).append(call)
            listed.setdefault(call.step_id & ROW_MASK, []).append(_call(call, kind))
        by_step = sorted(
            ({"step": self.names[key][0], "item": self.names[key][1], **_sum(entries), "calls": entries}
             for key, entries in listed.items()),
            key=lambda entry: -entry["known_cost_usd"],
        )  # fmt: skip
        reads = sum(call.cache_read_tokens for call in calls)
        return {
            **_sum([_call(call, "") for call in calls]),
            "calls": len(calls),
            "for": {
                kind: {"calls": len(members), **_sum([_call(call, kind) for call in members])}
                for kind, members in sorted(groups.items())
            },
            "cached_input_tokens": reads,
            "adopted": self._adopted(wanted),
            "steps": by_step[:SHOWN],
            "more_steps": max(0, len(by_step) - SHOWN),
        }

    def _adopted(self, wanted: set[int]) -> dict[str, Any]:
        """Return the steps whose work was paid for by an earlier run, and what it cost there."""
        sources = {key: self.details[key]["adopted_from"] for key in wanted if "adopted_from" in self.details[key]}
        costs: list[dict[str, Any]] = []
        ids = list(sources.values())
        for start in range(0, len(ids), 500):
            query = select(ledger).where(ledger.c.step_id.in_(ids[start : start + 500]))
            costs += [_call(call, "") for call in self.connection.execute(query)]
        saved = _sum(costs)
        return {
            "steps": [self._label(key) for key in sorted(sources)][:SHOWN],
            "count": len(sources),
            "saved_usd": saved["cost_usd"],
        }

    # How long it took

    def _times(self, calls: Sequence[Any], wanted: set[int]) -> dict[str, Any]:
        of_calls: dict[int, list[Any]] = {}
        for call in calls:
            of_calls.setdefault(call.step_id & ROW_MASK, []).append(call)
        parts = [part for key in sorted(wanted) if (part := self._took(key, of_calls.get(key, ()))) is not None]
        parts.sort(key=lambda part: -part["seconds"])
        end = self.run.finished_at or self.now
        begin = self.run.started_at
        return {
            "seconds": None if begin is None else _seconds(end - begin),
            "before_start_s": None if begin is None else _seconds(begin - self.run.created_at),
            "steps": parts[:SHOWN],
            "more_steps": max(0, len(parts) - SHOWN),
        }

    def _took(self, key: int, calls: Sequence[Any]) -> dict[str, Any] | None:
        """Return how a finished step's time was spent: in queues, in calls, and between them (retries, waits, the
        rest).
        """
        row = self.rows[key]
        node = self.plan.nodes[row.node]
        if row.finished_at is None or row.started_at is None or row.status == StepStatus.SKIPPED or node.bodies:
            return None
        ready = self._ready_at(key)
        begun = min([row.started_at, *(call.at - timedelta(milliseconds=call.latency_ms) for call in calls)])
        in_calls = sum(call.latency_ms for call in calls) / 1000
        whole = _seconds(row.finished_at - begun)
        name, item = self.names[key]
        return {
            "step": name,
            "item": item,
            "queue_s": _seconds(begun - ready),
            "calls_s": round(in_calls, 3),
            "other_s": round(max(0.0, whole - in_calls), 3),
            "seconds": round(_seconds(begun - ready) + whole, 3),
            "attempts": row.attempts,
        }


def _kinds(calls: Sequence[Any]) -> list[str]:
    """Return the purpose of each call.  The calls are ordered by step, claim and ordinal.

    `work`: the step's main call.  `repair`: follows a reply that did not match its schema.  `retry`: follows a failed
    attempt.  `fallback`: uses another model, because the first one failed.  `refused`: a 429.
    """
    found = []
    before: Any = None
    for call in calls:
        same = before is not None and before.step_id == call.step_id
        if call.outcome == "rate_limited":
            found.append("refused")
            continue
        if same and before.token == call.token:
            found.append("repair" if before.outcome == "invalid" and before.model == call.model else "fallback")
        else:
            found.append("retry" if call.attempt > 1 or same else "work")
        before = call
    return found


def _call(call: Any, kind: str) -> dict[str, Any]:
    return {
        "attempt": call.attempt,
        "call": call.ordinal,
        "for": kind,
        "provider": call.provider,
        "model": call.model,
        "outcome": call.outcome,
        "tokens": {
            "input": call.input_tokens,
            "cache_read": call.cache_read_tokens,
            "output": call.output_tokens,
            "reasoning": call.reasoning_tokens,
        },
        "cost_usd": None if call.cost_micro is None else call.cost_micro / MICRO,
        "latency_ms": call.latency_ms,
        "at": format_time(call.at),
    }


def _sum(calls: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of calls in exact micro-dollars; None if any of them is unknown."""
    known = sum(round(call["cost_usd"] * MICRO) for call in calls if call["cost_usd"] is not None) / MICRO
    unpriced = sum(call["cost_usd"] is None for call in calls)
    return {"cost_usd": None if unpriced else known, "known_cost_usd": known, "unpriced_calls": unpriced}


def _seconds(length: timedelta) -> float:
    return round(max(0.0, length.total_seconds()), 3)


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else format_time(moment)


def _of_the_run(entry: dict[str, Any], waits: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return what a step waits for when the whole run waits for its concurrency key."""
    if waits is None or entry["why"] != "paused":
        return entry
    return {**entry, "why": "key", "what": "it starts when the run holds its concurrency key", "since": waits["since"]}
