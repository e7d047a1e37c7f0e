"""A `Session` without database and broker, for tests of the layers above it.

A run executes nothing; a test advances it with `finish`.  Everything else follows the docstrings of `Session`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from gorgon_common.application.runs import Submitted
from gorgon_common.application.session import Session
from gorgon_common.client.schemas import RUN_FINISHED
from gorgon_common.clock import format_time
from gorgon_common.costs.history import History
from gorgon_common.costs.prices import GenaiPricer
from gorgon_common.costs.tokens import TokenEstimator
from gorgon_common.engine.estimate import estimate
from gorgon_common.errors import Conflict, InputInvalid, NotFound, Problem, WorkflowInvalid
from gorgon_common.ids import new_id
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.scope import SYSTEM, Scope
from gorgon_common.settings import Settings
from gorgon_common.telemetry import new_trace_id
from gorgon_common.workflow.compiler import check_inputs, try_compile
from gorgon_common.workflow.loader import load
from gorgon_common.workflow.plan import Kind, Plan

_ENGINE = {Kind.GATE, Kind.FINALLY, Kind.END}


def _now() -> str:
    return format_time(datetime.now(UTC))


class MemoryServices(Session):
    """Runs in a dict, newest last."""

    def __init__(self, settings: Settings | None = None) -> None:
        self.own_settings = settings or Settings()
        self.scope = SYSTEM
        self.healthy = True
        self._runs: dict[str, dict[str, Any]] = {}
        self._events: dict[str, list[dict[str, Any]]] = {}
        self._keys: dict[str, tuple[str, str]] = {}
        self._lock = threading.RLock()

    @property
    def settings(self) -> Settings:
        return self.own_settings

    def of(self, scope: Scope) -> MemoryServices:
        return self

    def read(self, text: str, *, file: str | None = None) -> tuple[Plan, list[Problem]]:
        loaded = load(text, file=file, roles=load_roles())
        made = try_compile(loaded, roles=load_roles())
        if made.plan is None:
            raise WorkflowInvalid(made.problems)
        return made.plan, [*loaded.problems, *made.problems]

    def submit(
        self,
        plan: Plan,
        inputs: Mapping[str, Any],
        *,
        target: str = "sandbox",
        team: str | None = None,
        idempotency_key: str | None = None,
        home: str = "",
        trace_id: str | None = None,
    ) -> Submitted:
        values = check_inputs(plan, inputs)
        digest = hashlib.sha256(json.dumps([plan.hash(), values, target], sort_keys=True).encode()).hexdigest()
        with self._lock:
            if idempotency_key in self._keys:
                run_id, known = self._keys[idempotency_key]
                if known != digest:
                    raise Conflict("This Idempotency-Key was used for a different request.")
                return Submitted(run_id, created=False)
            run_id = new_id("run")
            if idempotency_key:
                self._keys[idempotency_key] = (run_id, digest)
            steps = [_step(node) for node in plan.nodes[: plan.top] if node.kind not in _ENGINE]
            self._runs[run_id] = {
                "run_id": run_id,
                "workflow": plan.name,
                "status": "queued",
                "target": target,
                "team": team or plan.team,
                "trace_id": trace_id or new_trace_id(),
                "created_at": _now(),
                "outputs": None,
                "error": None,
                "cost_usd": 0.0,
                "known_cost_usd": 0.0,
                "unpriced_calls": 0,
                "tokens": {"input": 0, "output": 0},
                "started_at": None,
                "finished_at": None,
                "steps": steps,
            }
            self._events[run_id] = []
            self.event(run_id, "run.queued")
        return Submitted(run_id, created=True, to_run=len(steps))

    def estimate(
        self, plan: Plan, inputs: Mapping[str, Any], *, target: str = "sandbox", team: str | None = None
    ) -> dict[str, Any]:
        return estimate(
            plan,
            check_inputs(plan, inputs),
            target=target,
            history=History(),
            estimator=TokenEstimator(),
            prices=GenaiPricer(),
        )

    def event(self, run_id: str, kind: str, step: str | None = None, message: str | None = None) -> None:
        """Write an entry to a run's journal."""
        with self._lock:
            entries = self._events[run_id]
            seq = len(entries) + 1
            entries.append({"seq": seq, "at": _now(), "kind": kind, "step": step, "message": message, "data": None})

    def finish(self, run_id: str, status: str = "succeeded", outputs: Any = None, error: Any = None) -> None:
        """Let a run end."""
        with self._lock:
            run = self._runs[run_id]
            run.update(status=status, outputs=outputs, error=error, started_at=_now(), finished_at=_now())
            for step in run["steps"]:
                step.update(status=status, started_at=_now(), finished_at=_now(), attempts=1)
                self.event(run_id, f"step.{status}", step["id"])
            self.event(run_id, f"run.{status}")

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, Any]:
        with self._lock:
            if run_id not in self._runs:
                raise NotFound(f"There is no run {run_id}.")
            found: dict[str, Any] = json.loads(json.dumps(self._runs[run_id]))
        if not steps:
            del found["steps"]
        return found

    def runs(
        self, *, status: str | None = None, workflow: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> dict[str, Any]:
        with self._lock:
            items = [self.run(run_id) for run_id in reversed(self._runs)]
        items = [run for run in items if status in (None, run["status"]) and workflow in (None, run["workflow"])]
        start = 0
        if cursor is not None:
            try:
                start = int(base64.urlsafe_b64decode(cursor.encode()))
            except ValueError:
                raise InputInvalid(f"{cursor!r} is not a cursor of this list.") from None
        end = start + limit
        following = base64.urlsafe_b64encode(str(end).encode()).decode() if end < len(items) else None
        return {"items": items[start:end], "next": following}

    def events(self, run_id: str, *, after: int = 0, limit: int = 500) -> list[dict[str, Any]]:
        self.run(run_id)
        with self._lock:
            return [event for event in self._events[run_id] if event["seq"] > after][:limit]

    def cancel(self, run_id: str) -> dict[str, Any]:
        if self.run(run_id)["status"] in RUN_FINISHED:
            raise Conflict("The run is finished.")
        self.finish(run_id, "cancelled")
        return self.run(run_id)

    def resume(
        self, run_id: str, *, plan: Plan | None = None, home: str | None = None, trace_id: str | None = None
    ) -> Submitted:
        before = self.run(run_id, steps=True)
        if before["status"] not in RUN_FINISHED:
            raise Conflict("The run is still going on.")
        new = new_id("run")
        with self._lock:
            self._runs[new] = {**before, "run_id": new, "status": "queued", "finished_at": None}
            self._events[new] = []
        self.event(new, "run.resumed")
        return Submitted(new, created=True, reused=1, to_run=len(before["steps"]) - 1)

    def health(self) -> dict[str, Any]:
        return {
            "database": {"ok": self.healthy, "detail": "in memory at secret-host"},
            "broker": {"ok": True, "detail": "in memory"},
        }

    def close(self) -> None:
        pass


def _step(node: Any) -> dict[str, Any]:
    return {
        "id": node.id,
        "item": None,
        "parent": None,
        "kind": node.kind.value,
        "role": node.spec.get("role"),
        "provider": node.queue,
        "model": None,
        "status": "pending",
        "reason": None,
        "waits": None,
        "output": None,
        "error": None,
        "attempts": 0,
        "tokens": {"input": 0, "output": 0},
        "cost_usd": None,
        "known_cost_usd": 0.0,
        "unpriced_calls": 0,
        "started_at": None,
        "finished_at": None,
    }
