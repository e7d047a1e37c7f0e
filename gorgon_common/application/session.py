"""A session: everything that one caller can do on the configured database, with the methods of the HTTP client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from gorgon_common import bootstrap
from gorgon_common.application import budgets, costs, estimates, health, limits, runs, workflows
from gorgon_common.application.runs import Submission, Submitted
from gorgon_common.bootstrap import Services
from gorgon_common.costs.tracker import RecordedCall
from gorgon_common.errors import Problem
from gorgon_common.scope import SYSTEM, Scope
from gorgon_common.settings import Settings
from gorgon_common.workflow.plan import Plan


class Session:
    """Binds the services of this process to the scope of a caller.  Thread-safe.

    Each method is the function of that resource's module, which documents its arguments, its result and its errors.
    `client.http.Client` has the same methods, and returns the same documents.
    """

    def __init__(self, services: Services, scope: Scope = SYSTEM) -> None:
        self.services = services
        self.scope = scope

    def of(self, scope: Scope) -> Session:
        """Return a session for another caller on the same services."""
        return Session(self.services, scope)

    @property
    def settings(self) -> Settings:
        """The settings that the services are wired for."""
        return self.services.settings

    def close(self) -> None:
        """Release the connections of the services."""
        self.services.close()

    # Workflows

    def read(self, text: str, *, file: str | None = None) -> tuple[Plan, list[Problem]]:
        """Load and compile a workflow; returns the plan and the warnings.  Raises WorkflowInvalid."""
        return workflows.read(text, file=file)

    def estimate(
        self, plan: Plan, inputs: Mapping[str, Any], *, target: str = "sandbox", team: str | None = None
    ) -> dict[str, Any]:
        """Return the predicted usage of a run, before anything is spent."""
        return estimates.estimate(self.services, self.scope, plan, inputs, target=target, team=team)

    # Runs

    def submit(self, plan: Plan, inputs: Mapping[str, Any], **options: Any) -> Submitted:
        """Start a run; `options` are the other fields of `runs.Submission`."""
        return runs.submit(self.services, self.scope, Submission(plan, inputs, **options))

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, Any]:
        """Return one run."""
        return runs.show(self.services, self.scope, run_id, steps=steps)

    def runs(
        self, *, status: str | None = None, workflow: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> dict[str, Any]:
        """Return a page of runs, newest first."""
        return runs.page(self.services, self.scope, status=status, workflow=workflow, limit=limit, cursor=cursor)

    def events(self, run_id: str, *, after: int = 0, limit: int = 500) -> list[dict[str, Any]]:
        """Return the run's journal after a sequence number, oldest first."""
        return runs.events(self.services, self.scope, run_id, after=after, limit=limit)

    def explain(self, run_id: str, step: str | None = None) -> dict[str, Any]:
        """Return what a run or a step waits for, what its money was spent on, and how long its parts took."""
        return runs.explain(self.services, self.scope, run_id, step)

    def cancel(self, run_id: str) -> dict[str, Any]:
        """Request the cancellation of a run; returns the run."""
        return runs.cancel(self.services, self.scope, run_id)

    def send_event(self, run_id: str, name: str, data: Any = None) -> dict[str, Any]:
        """Send an event to a run; returns the run."""
        return runs.send_event(self.services, self.scope, run_id, name, data)

    def resume(
        self, run_id: str, *, plan: Plan | None = None, home: str | None = None, trace_id: str | None = None
    ) -> Submitted:
        """Continue a run as a new one that adopts its finished steps."""
        return runs.resume(self.services, self.scope, run_id, plan=plan, home=home, trace_id=trace_id)

    def plan_of(self, run_id: str) -> Plan:
        """Return the stored plan of a run."""
        return runs.plan_of(self.services, self.scope, run_id)

    def number(self, run_id: str) -> int:
        """Return the number by which workers know a run."""
        return runs.number(self.services, self.scope, run_id)

    def vacate(self, run_id: str, is_deserted: Callable[[str], bool]) -> bool:
        """Release a run whose process was killed; returns whether it was."""
        return runs.vacate(self.services, self.scope, run_id, is_deserted)

    # Money

    def costs(self, by: Sequence[str], **filters: Any) -> dict[str, Any]:
        """Return the costs of calls by some of their properties; `filters` as for `costs.report`."""
        return costs.report(self.services, self.scope, by, **filters)

    def calls(self, **filters: Any) -> dict[str, Any]:
        """Return a page of calls; `filters` as for `costs.calls`."""
        return costs.calls(self.services, self.scope, **filters)

    def record_calls(self, calls: Sequence[RecordedCall]) -> None:
        """Store calls that were made outside of runs."""
        costs.record(self.services, self.scope, calls)

    def set_budget(self, subject: str, **limits: Any) -> dict[str, Any]:
        """Set a budget, and return it; `limits` as for `budgets.change`."""
        return budgets.change(self.services, self.scope, subject, **limits)

    def list_budgets(self) -> list[dict[str, Any]]:
        """Return every budget with what is spent and reserved."""
        return budgets.listing(self.services, self.scope)

    # Limits and health

    def limits(self) -> dict[str, Any]:
        """Return the use of rate limits, the limits set by people, and the accuracy of token estimates."""
        return limits.show(self.services, self.scope)

    def set_limits(
        self, provider: str, model: str, values: Mapping[str, float], *, clear: bool = False
    ) -> dict[str, Any]:
        """Set or clear limits for a provider's models."""
        return limits.change(self.services, self.scope, provider, model, values, clear=clear)

    def health(self) -> dict[str, Any]:
        """Return whether the database and the broker can be reached."""
        return health.check(self.services)

    def now(self) -> datetime:
        """Return the database's time: aware, UTC."""
        return runs.now(self.services)


def open_session(settings: Settings, scope: Scope = SYSTEM) -> Session:
    """Return a session on newly wired services; the caller closes it.  Raises ConfigurationError, Unavailable."""
    return Session(bootstrap.build(settings), scope)
