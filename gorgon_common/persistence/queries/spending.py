"""What the money of a run was spent on, and how long its parts took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import select

from gorgon_common.clock import format_time
from gorgon_common.engine.records import ROW_MASK
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence.queries.amounts import MICRO
from gorgon_common.persistence.queries.reading import SHOWN, Reading
from gorgon_common.persistence.tables import ledger


class Spending:
    """The calls and the time of some of a run's rows."""

    def __init__(self, read: Reading, wanted: set[int]) -> None:
        self.read = read
        self.wanted = wanted
        self.calls = [call for call in self._calls() if call.step_id & ROW_MASK in wanted]

    def _calls(self) -> Sequence[Any]:
        return self.read.connection.execute(
            select(ledger)
            .where(ledger.c.step_id >= self.read.low, ledger.c.step_id < self.read.high, ledger.c.provider != "none")
            .order_by(ledger.c.step_id, ledger.c.token, ledger.c.ordinal)
        ).all()

    def money(self) -> dict[str, Any]:
        """Return what the calls cost, by purpose and by step."""
        calls = self.calls
        groups: dict[str, list[Any]] = {}
        listed: dict[int, list[dict[str, Any]]] = {}
        for call, kind in zip(calls, _kinds(calls), strict=True):
            groups.setdefault(kind, []).append(call)
            listed.setdefault(call.step_id & ROW_MASK, []).append(_call(call, kind))
        by_step = sorted(
            ({"step": self.read.names[key][0], "item": self.read.names[key][1], **_sum(entries), "calls": entries}
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
            "adopted": self._adopted(),
            "steps": by_step[:SHOWN],
            "more_steps": max(0, len(by_step) - SHOWN),
        }

    def _adopted(self) -> dict[str, Any]:
        """Return the steps whose work was paid for by an earlier run, and what it cost there."""
        sources = {
            key: self.read.details[key]["adopted_from"]
            for key in self.wanted
            if "adopted_from" in self.read.details[key]
        }
        costs: list[dict[str, Any]] = []
        ids = list(sources.values())
        for start in range(0, len(ids), 500):
            query = select(ledger).where(ledger.c.step_id.in_(ids[start : start + 500]))
            costs += [_call(call, "") for call in self.read.connection.execute(query)]
        saved = _sum(costs)
        return {
            "steps": [self.read.label(key) for key in sorted(sources)][:SHOWN],
            "count": len(sources),
            "saved_usd": saved["cost_usd"],
        }

    def times(self) -> dict[str, Any]:
        """Return how long the run and its steps took."""
        of_calls: dict[int, list[Any]] = {}
        for call in self.calls:
            of_calls.setdefault(call.step_id & ROW_MASK, []).append(call)
        parts = [part for key in sorted(self.wanted) if (part := self._took(key, of_calls.get(key, ()))) is not None]
        parts.sort(key=lambda part: -part["seconds"])
        end = self.read.run.finished_at or self.read.now
        begin = self.read.run.started_at
        return {
            "seconds": None if begin is None else _seconds(end - begin),
            "before_start_s": None if begin is None else _seconds(begin - self.read.run.created_at),
            "steps": parts[:SHOWN],
            "more_steps": max(0, len(parts) - SHOWN),
        }

    def _took(self, key: int, calls: Sequence[Any]) -> dict[str, Any] | None:
        """Return how a finished step's time was spent: in queues, in calls, and between them (retries, waits, the
        rest).
        """
        row = self.read.rows[key]
        node = self.read.plan.nodes[row.node]
        if row.finished_at is None or row.started_at is None or row.status == StepStatus.SKIPPED or node.bodies:
            return None
        ready = self.read.ready_at(key)
        begun = min([row.started_at, *(call.at - timedelta(milliseconds=call.latency_ms) for call in calls)])
        in_calls = sum(call.latency_ms for call in calls) / 1000
        whole = _seconds(row.finished_at - begun)
        name, item = self.read.names[key]
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
