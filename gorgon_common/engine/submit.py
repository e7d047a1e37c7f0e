"""Turns a plan and its inputs into a run, and publishes the run's first steps.

Check the inputs, build the rows, commit them in one transaction, publish.  If this process dies after the commit, the
sweep publishes the steps; if it dies before, nothing has happened.  The same idempotency key returns the same run.  A
run that waits for its concurrency key is published by the process that grants it the key.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Protocol

from gorgon_common import telemetry
from gorgon_common.engine import rows
from gorgon_common.engine.concurrency import Stops, evict, hold_of
from gorgon_common.engine.context import RunCache
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.records import KeyDecision, NewRun, ReadyStep, Row, step_id
from gorgon_common.errors import InputInvalid, KeyTaken, NotAvailable
from gorgon_common.masking import SECRETS
from gorgon_common.scope import Scope
from gorgon_common.workflow.plan import Plan


class Creates(Stops, Protocol):
    """The store as submission uses it."""

    def create(self, new: NewRun, rows: Sequence[Row], *, scope: Scope) -> tuple[int, bool]:
        """Insert a run and its steps for a scope, whose actor is stored; returns (run number, whether it is new)."""
        ...

    def admission(self, run: int) -> KeyDecision:
        """Return whether a run holds its concurrency key, and which runs must be cancelled to make way for it."""
        ...

    def orphaned(self, run: int) -> bool:
        """Tell whether an embedded run no longer has a live worker."""
        ...

    def close_orphan(self, run: int, *, cancelled: bool = False) -> bool:
        """End a run whose process has died."""
        ...


def submit(
    plan: Plan,
    inputs: Mapping[str, Any],
    *,
    store: Creates,
    knowledge: RunCache,
    publisher: Publisher,
    grouped: frozenset[int],
    public_id: str,
    now: datetime,
    target: str,
    home: str,
    scope: Scope,
    team: str | None = None,
    idempotency_key: str | None = None,
    root: int | None = None,
    resumed_from: int | None = None,
    trace_id: str | None = None,
) -> tuple[int, bool]:
    """Create a run and publish its ready steps.  `inputs` must already be validated; `grouped` is described in
    `canvas.lowering`.  `scope`: for whom; `team` may be another one that the caller may act for.

    Returns (run number, whether the run is new).  Raises NotAvailable, InputInvalid (the concurrency key cannot be
    rendered), Conflict, KeyTaken, Unavailable.
    """
    if plan.unavailable:
        raise NotAvailable(
            "This workflow cannot run yet:\n" + "\n".join(f"  {reason}" for reason in plan.unavailable),
            hint="It is valid and can be planned; remove these steps to run the rest.",
        )
    body = plan.to_json()
    _refuse_secrets(plan, body, inputs)
    plan_hash = hashlib.sha256(body.encode()).hexdigest()
    new = NewRun(
        public_id=public_id,
        workflow=plan.name,
        plan_hash=plan_hash,
        plan_body=body,
        inputs=inputs,
        target=target,
        created_at=now,
        org=scope.org,
        team=team or plan.team,
        home=home,
        root=root,
        resumed_from=resumed_from,
        idempotency_key=idempotency_key,
        request_hash=_digest(plan_hash, inputs, target, team),
        timeout=plan.limits.get("timeout"),
        max_parallel=plan.limits.get("max_parallel"),
        trace_id=trace_id or telemetry.new_trace_id(),
        hold=hold_of(plan, inputs, run_id=public_id, team=team or plan.team, now=now),
    )
    first = rows.top_rows(plan, plan.successors(), grouped)
    number, created = _create(store, new, first, scope)
    if created:
        knowledge.learn(plan, plan_hash)
        ref = telemetry.RunRef(public_id, plan.name, new.team, target, new.trace_id)
        telemetry.emit(telemetry.RunCreated(ref, resumes=resumed_from is not None))
        admission = KeyDecision(holds=True) if new.hold is None else store.admission(number)
        evict(store, knowledge, publisher, admission.evict)
        if admission.holds:
            publisher.publish(_heads(number, first))
    return number, created


def _refuse_secrets(plan: Plan, body: str, inputs: Mapping[str, Any]) -> None:
    """Raise InputInvalid if an input or the workflow contains the value of a secret; both are stored and displayed."""
    for name in plan.secrets:
        SECRETS.add(name, os.environ.get(name), declared=True)
    hint = "Name it under `secrets:` and use it as {{secrets.NAME}} under `env:`; values stay out of what is stored."
    for name, value in inputs.items():
        secret = SECRETS.found(json.dumps(value, ensure_ascii=False, default=str))
        if secret is not None:
            raise InputInvalid(f"The input `{name}` contains the value of the secret {secret}.", hint=hint)
    secret = SECRETS.found(body)
    if secret is not None:
        raise InputInvalid(f"The workflow contains the value of the secret {secret}.", hint=hint)


def _create(store: Creates, new: NewRun, first: Sequence[Row], scope: Scope) -> tuple[int, bool]:
    """Create the run.  Runs whose process has died are closed first if they hold its concurrency key."""
    try:
        return store.create(new, first, scope=scope)
    except KeyTaken as taken:
        dead = [number for number in taken.numbers if store.orphaned(number)]
        if not dead:
            raise
        for number in dead:
            store.close_orphan(number)
        return store.create(new, first, scope=scope)


def _heads(run: int, first: Sequence[Row]) -> list[ReadyStep]:
    return [
        ReadyStep(step_id(run, row.row), row.node, int(row.weight), row.queue) for row in first if not row.deps_left
    ]


def _digest(plan_hash: str, inputs: Mapping[str, Any], target: str, team: str | None) -> str:
    request = json.dumps([plan_hash, dict(inputs), target, team], sort_keys=True, default=str)
    return hashlib.sha256(request.encode("utf-8", "replace")).hexdigest()
