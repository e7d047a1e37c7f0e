"""The composition root: settings in, wired services out.  The only module that knows every adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gorgon_common.errors import Problem
from gorgon_common.settings import Settings
from gorgon_common.workflow.plan import Plan


@dataclass(frozen=True, slots=True)
class Submitted:
    """What a submission gives back.  `created` is False where the idempotency key was known already."""

    run_id: str
    created: bool
    reused: int = 0
    to_run: int = 0


class Services:
    """Everything that CLI and API do with runs; thread-safe.

    Runs are given in the documented machine form (docs/http-api.md): `{run_id, workflow, status, outputs, error,
    cost_usd, tokens: {input, output}, started_at, finished_at, …}`, with `steps: […]` where asked for.
    """

    settings: Settings

    def read(self, text: str, *, file: str | None = None) -> tuple[Plan, list[Problem]]:
        """Load and compile a workflow; returns the plan and the warnings.  Raises WorkflowInvalid."""
        raise NotImplementedError

    def submit(
        self,
        plan: Plan,
        inputs: Mapping[str, Any],
        *,
        target: str = "sandbox",
        team: str | None = None,
        idempotency_key: str | None = None,
        home: str = "",
    ) -> Submitted:
        """Check the inputs, create the run, commit, publish its first steps.

        `target`: live | sandbox.  `home`: "" for a run that any worker may take, else the embedded home that owns it.
        Raises InputInvalid, NotAvailable, Conflict (same key, different request), Unavailable.
        """
        raise NotImplementedError

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, Any]:
        """Return one run.  Raises NotFound."""
        raise NotImplementedError

    def runs(
        self, *, status: str | None = None, workflow: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> dict[str, Any]:
        """Return `{items: [run…], next: cursor | None}`, newest first."""
        raise NotImplementedError

    def events(self, run_id: str, *, after: int = 0, limit: int = 500) -> list[dict[str, Any]]:
        """Return the run's journal after sequence number `after`: `{seq, at, kind, step, message, data}`, oldest first.

        kinds: run.queued run.started run.finishing run.succeeded run.failed run.cancelled run.resumed
        step.succeeded step.failed step.skipped step.cancelled step.retry step.waiting step.expanded step.checkpoint …
        """
        raise NotImplementedError

    def cancel(self, run_id: str) -> dict[str, Any]:
        """Ask the run to end; returns it.  Raises NotFound, Conflict (finished already)."""
        raise NotImplementedError

    def resume(self, run_id: str, *, plan: Plan | None = None, home: str | None = None) -> Submitted:
        """Continue a finished, failed, cancelled or orphaned run as a new run that adopts what is finished.

        Raises NotFound, Conflict (it is still running).
        """
        raise NotImplementedError

    def health(self) -> dict[str, Any]:
        """Return `{database: {ok, detail}, broker: {ok, detail}}`."""
        raise NotImplementedError

    def close(self) -> None:
        """Release connections."""
        raise NotImplementedError


def build(settings: Settings) -> Services:
    """Wire the services for these settings (database migrated on the SQLite tier, checked on PostgreSQL)."""
    raise NotImplementedError
