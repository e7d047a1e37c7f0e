"""Runs: start, look at, follow, cancel, resume, send events to.

Runs have the documented JSON form (docs/http-api.md): `{run_id, workflow, status, outputs, error, cost_usd, tokens:
{input, output}, started_at, finished_at, …}`, with `steps: […]` on request.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from gorgon_common import lazy
from gorgon_common.bootstrap import Services
from gorgon_common.canvas import lowering
from gorgon_common.clock import SYSTEM_CLOCK
from gorgon_common.engine import control
from gorgon_common.engine.context import Run
from gorgon_common.engine.submit import submit as submit_run
from gorgon_common.errors import InputInvalid
from gorgon_common.ids import new_id
from gorgon_common.scope import Scope
from gorgon_common.workflow.plan import Plan

_TEAM_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Submitted:
    """The result of a submission.  `created` is False if the idempotency key was already known."""

    run_id: str
    created: bool
    reused: int = 0
    to_run: int = 0


@dataclass(frozen=True, slots=True)
class Submission:
    """A run to start.

    `target`: live | sandbox.  `team`: the owner; None: the team named in the file.  `home`: "" for a run that any
    worker may take, otherwise the embedded home that owns it.  `trace_id`: the trace that the run belongs to; None: a
    new one.
    """

    plan: Plan
    inputs: Mapping[str, Any]
    target: str = "sandbox"
    team: str | None = None
    idempotency_key: str | None = None
    home: str = ""
    trace_id: str | None = None


def submit(services: Services, scope: Scope, asked: Submission) -> Submitted:
    """Check the inputs, create the run, commit, and publish its first steps.

    Raises InputInvalid, NotAvailable, Conflict (same key, different request), KeyTaken (another run holds the
    concurrency key), Unavailable.
    """
    values = lazy.load("gorgon_common.workflow.compiler:check_inputs")(asked.plan, asked.inputs)
    team = asked.team
    if team is not None and (not 0 < len(team) <= _TEAM_LENGTH or "\x00" in team):
        raise InputInvalid(f"{team[:60]!r} cannot be the name of a team.", hint="It has 1 to 100 characters.")
    number, created = submit_run(
        asked.plan,
        values,
        store=services.store,
        knowledge=services.knowledge,
        publisher=services.publisher(asked.target, asked.home),
        grouped=lowering.grouped(lowering.shape(asked.plan)),
        public_id=new_id("run"),
        now=SYSTEM_CLOCK.now(),
        target=asked.target,
        home=asked.home,
        org=scope.org,
        team=team,
        idempotency_key=asked.idempotency_key,
        trace_id=asked.trace_id,
    )
    return Submitted(services.views.public_id(number), created, to_run=control.work(asked.plan))


def show(services: Services, scope: Scope, run_id: str, *, steps: bool = False) -> dict[str, Any]:
    """Return one run.  Raises NotFound."""
    return services.views.run(run_id, with_steps=steps)


def page(
    services: Services,
    scope: Scope,
    *,
    status: str | None = None,
    workflow: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> dict[str, Any]:
    """Return `{items: [run…], next: cursor | None}`, newest first.  Raises InputInvalid."""
    return services.views.runs(status=status, workflow=workflow, limit=limit, cursor=cursor)


def events(services: Services, scope: Scope, run_id: str, *, after: int = 0, limit: int = 500) -> list[dict[str, Any]]:
    """Return the run's journal after sequence number `after`: `{seq, at, kind, step, message, data}`, oldest first.

    kinds: run.queued run.admitted run.started run.finishing run.succeeded run.failed run.cancelled run.resumed
    step.succeeded step.failed step.skipped step.cancelled step.retry step.waiting step.expanded step.recovered …
    """
    return services.views.events(run_id, after=after, limit=limit)


def cancel(services: Services, scope: Scope, run_id: str) -> dict[str, Any]:
    """Request the cancellation of a run; returns the run.  Raises NotFound, Conflict (already finished)."""
    run = _run(services, scope, run_id)
    control.cancel(services.store, services.publisher(run.info.target, run.info.home), run)
    return show(services, scope, run_id)


def send_event(services: Services, scope: Scope, run_id: str, name: str, data: Any = None) -> dict[str, Any]:
    """Send an event to a run, for a step that waits for it or will; returns the run.

    Raises NotFound, Conflict (it has ended), InputInvalid (the name).
    """
    run = _run(services, scope, run_id)
    control.send_event(services.store, services.publisher(run.info.target, run.info.home), run, name, data)
    return show(services, scope, run_id)


def resume(
    services: Services,
    scope: Scope,
    run_id: str,
    *,
    plan: Plan | None = None,
    home: str | None = None,
    trace_id: str | None = None,
) -> Submitted:
    """Continue a finished, failed, cancelled or orphaned run as a new run that adopts its finished steps.

    Raises NotFound, Conflict (it is still running).
    """
    before = _run(services, scope, run_id)
    where = "" if home is None else home
    number, reused, left = control.resume(
        services.store,
        services.knowledge,
        before,
        plan or before.plan,
        publisher=services.publisher(before.info.target, where),
        public_id=new_id("run"),
        now=SYSTEM_CLOCK.now(),
        home=where,
        grouped=lowering.grouped(lowering.shape(plan or before.plan)),
        trace_id=trace_id,
    )
    return Submitted(services.views.public_id(number), True, reused, left)


def plan_of(services: Services, scope: Scope, run_id: str) -> Plan:
    """Return the stored plan of a run.  Raises NotFound."""
    return _run(services, scope, run_id).plan


def vacate(services: Services, scope: Scope, run_id: str, is_deserted: Callable[[str], bool]) -> bool:
    """Release a run whose process was killed, instead of waiting for its lease to expire.

    `is_deserted` tells whether the process of an embedded home is known to be dead.  Returns whether it was.
    """
    home = _run(services, scope, run_id).info.home
    if not home or not is_deserted(home):
        return False
    services.store.vacate(home)
    return True


def explain(services: Services, scope: Scope, run_id: str, step: str | None = None) -> dict[str, Any]:
    """Return what a run (or a step of it) waits for, what its money was spent on, and how long its parts took.

    Raises NotFound.
    """
    explanations = lazy.load("gorgon_common.persistence.explain:Explanations")(
        services.database, services.knowledge.plan
    )
    document: dict[str, Any] = explanations.explain(run_id, step)
    return document


def number(services: Services, scope: Scope, run_id: str) -> int:
    """Return the internal number of a run, by which workers know it.  Raises NotFound."""
    return services.views.number(run_id)


def now(services: Services) -> datetime:
    """Return the database's time: aware, UTC."""
    return services.views.now()


def _run(services: Services, scope: Scope, run_id: str) -> Run:
    return services.knowledge.run(number(services, scope, run_id))
