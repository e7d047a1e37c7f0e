"""The composition root: turns settings into wired services.  The only module that knows every adapter."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon_common import lazy, metrics, queues
from gorgon_common.canvas import lowering
from gorgon_common.canvas.celery import CeleryCanvas, make_app
from gorgon_common.clock import SYSTEM_CLOCK
from gorgon_common.costs.tracker import RecordedCall
from gorgon_common.engine import control
from gorgon_common.engine.context import RunCache
from gorgon_common.engine.limits import Limiter, LimitKey
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.submit import submit
from gorgon_common.engine.sweep import Sweep
from gorgon_common.errors import GorgonError, InputInvalid, Problem, Unavailable
from gorgon_common.home import protect
from gorgon_common.ids import new_id
from gorgon_common.operations.providers import SERVERS
from gorgon_common.persistence import migrate
from gorgon_common.persistence.budgets import UNCHANGED, Budgets
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.limits import LimitRules, LimitStates
from gorgon_common.persistence.reports import Filters, Reports
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.views import Views
from gorgon_common.ratelimit.local import StoredLimiter
from gorgon_common.ratelimit.quotas import QuotaBook, Rule, checked, read_limits
from gorgon_common.settings import Settings
from gorgon_common.workflow.plan import Plan

TARGETS = ("live", "sandbox")
"""Where the calls of a run go."""

_TEAM_LENGTH = 100


@dataclass(frozen=True, slots=True)
class Submitted:
    """The result of a submission.  `created` is False if the idempotency key was already known."""

    run_id: str
    created: bool
    reused: int = 0
    to_run: int = 0


class Services:
    """Everything that CLI and API do with runs.  Thread-safe.

    Runs have the documented JSON form (docs/http-api.md): `{run_id, workflow, status, outputs, error, cost_usd, tokens:
    {input, output}, started_at, finished_at, …}`, with `steps: […]` on request.
    """

    def __init__(self, settings: Settings, database: Database, *, events: bool = False, app: Any = None) -> None:
        self.settings = settings
        self.database = database
        self.store = Store(database, poison_deaths=settings.poison_deaths)
        self.budgets = Budgets(database)
        self.knowledge = RunCache(self.store)
        broker = _broker(settings)
        self.app = app or make_app(broker, events=events)
        self._broker = broker
        self._canvases: dict[str, CeleryCanvas] = {}
        self.views = Views(database, self.knowledge.plan)
        self.reports = Reports(database, self.knowledge.plan)
        self._publishers: dict[tuple[str, str], Publisher] = {}

    def canvas(self, target: str) -> CeleryCanvas:
        """Return the canvas that creates and sends the messages for runs of a target."""
        if target not in self._canvases:
            self._canvases[target] = CeleryCanvas(self.app, self._broker, target)
        return self._canvases[target]

    def publisher(self, target: str, home: str) -> Publisher:
        """Return the publisher for steps of runs of a target and home; there is one of each per process."""
        key = (target, home)
        if key not in self._publishers:
            self._publishers[key] = Publisher(self.store, self.knowledge, self.canvas(target), target=target, home=home)
        return self._publishers[key]

    def sweeps(self) -> list[Sweep]:
        """Return the sweeps of runs that any worker may take.  The API runs them too, so they do not need a live
        worker.
        """
        return [
            Sweep(
                self.store,
                self.knowledge,
                self.publisher(target, ""),
                self.canvas(target),
                name=new_id("sweep"),
                home="",
            )
            for target in TARGETS
        ]

    def read(self, text: str, *, file: str | None = None) -> tuple[Plan, list[Problem]]:
        """Load and compile a workflow; returns the plan and the warnings.  Raises WorkflowInvalid."""
        roles = lazy.load("gorgon_common.roles.catalogue:load_roles")()
        operations = lazy.load("gorgon_common.operations.catalogue:load_operations")()
        plan, problems = lazy.load("gorgon_common.workflow.source:read_workflow")(
            text, file=file, roles=roles, operations=operations
        )
        return plan, problems

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
        """Check the inputs, create the run, commit, and publish its first steps.

        `target`: live | sandbox.  `home`: "" for a run that any worker may take, otherwise the embedded home that owns
        it.  `team`: the owner; None: the team named in the file.  `trace_id`: the trace that the run belongs to; None:
        a new trace.  Raises InputInvalid, NotAvailable, Conflict (same key, different request), KeyTaken (another run
        holds the concurrency key), Unavailable.
        """
        values = lazy.load("gorgon_common.workflow.compiler:check_inputs")(plan, inputs)
        if team is not None and (not 0 < len(team) <= _TEAM_LENGTH or "\x00" in team):
            raise InputInvalid(f"{team[:60]!r} cannot be the name of a team.", hint="It has 1 to 100 characters.")
        number, created = submit(
            plan,
            values,
            store=self.store,
            knowledge=self.knowledge,
            publisher=self.publisher(target, home),
            grouped=lowering.grouped(lowering.shape(plan)),
            public_id=new_id("run"),
            now=SYSTEM_CLOCK.now(),
            target=target,
            home=home,
            team=team,
            idempotency_key=idempotency_key,
            trace_id=trace_id,
        )
        return Submitted(self.views.public_id(number), created, to_run=control.work(plan))

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, Any]:
        """Return one run.  Raises NotFound."""
        return self.views.run(run_id, with_steps=steps)

    def runs(
        self, *, status: str | None = None, workflow: str | None = None, limit: int = 50, cursor: str | None = None
    ) -> dict[str, Any]:
        """Return `{items: [run…], next: cursor | None}`, newest first."""
        return self.views.runs(status=status, workflow=workflow, limit=limit, cursor=cursor)

    def events(self, run_id: str, *, after: int = 0, limit: int = 500) -> list[dict[str, Any]]:
        """Return the run's journal after sequence number `after`: `{seq, at, kind, step, message, data}`, oldest first.

        kinds: run.queued run.admitted run.started run.finishing run.succeeded run.failed run.cancelled run.resumed
        step.succeeded step.failed step.skipped step.cancelled step.retry step.waiting step.expanded step.recovered …
        """
        return self.views.events(run_id, after=after, limit=limit)

    def cancel(self, run_id: str) -> dict[str, Any]:
        """Request the cancellation of a run; returns the run.  Raises NotFound, Conflict (already finished)."""
        run = self.knowledge.run(self.views.number(run_id))
        control.cancel(self.store, self.publisher(run.info.target, run.info.home), run)
        return self.run(run_id)

    def send_event(self, run_id: str, name: str, data: Any = None) -> dict[str, Any]:
        """Send an event to a run, for a step that waits for it or will; returns the run.

        Raises NotFound, Conflict (it has ended), InputInvalid (the name).
        """
        run = self.knowledge.run(self.views.number(run_id))
        control.send_event(self.store, self.publisher(run.info.target, run.info.home), run, name, data)
        return self.run(run_id)

    def resume(
        self, run_id: str, *, plan: Plan | None = None, home: str | None = None, trace_id: str | None = None
    ) -> Submitted:
        """Continue a finished, failed, cancelled or orphaned run as a new run that adopts its finished steps.

        Raises NotFound, Conflict (it is still running).
        """
        before = self.knowledge.run(self.views.number(run_id))
        where = "" if home is None else home
        number, reused, left = control.resume(
            self.store,
            self.knowledge,
            before,
            plan or before.plan,
            publisher=self.publisher(before.info.target, where),
            public_id=new_id("run"),
            now=SYSTEM_CLOCK.now(),
            home=where,
            grouped=lowering.grouped(lowering.shape(plan or before.plan)),
            trace_id=trace_id,
        )
        return Submitted(self.views.public_id(number), True, reused, left)

    def costs(
        self,
        by: Sequence[str],
        *,
        since: str | None = None,
        until: str | None = None,
        only: Mapping[str, str] | None = None,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Return the costs of calls, with a row for each combination of `by`; see `Reports.report`.

        `since`, `until`: days in UTC (the last one included) or RFC 3339 times.  `only`: dimension → value; its target
        may be `all`.  Without a target, only calls that cost real money are included; see `Filters.read`.  Raises
        InputInvalid.
        """
        return self.reports.report(by, Filters.read(since, until, only, by), limit=limit)

    def calls(
        self,
        *,
        since: str | None = None,
        until: str | None = None,
        only: Mapping[str, str] | None = None,
        limit: int = 1000,
        cursor: str | None = None,
    ) -> dict[str, Any]:
        """Return `{items, next}`: a row for each call; see `Reports.calls`.  Raises InputInvalid."""
        return self.reports.calls(Filters.read(since, until, only), limit=limit, cursor=cursor)

    def record_calls(self, calls: Sequence[RecordedCall]) -> None:
        """Store calls that were made outside of runs, for reports; see `costs.tracker`."""
        self.reports.record(calls)

    def estimate(
        self, plan: Plan, inputs: Mapping[str, Any], *, target: str = "sandbox", team: str | None = None
    ) -> dict[str, Any]:
        """Return the predicted usage of a run, before anything is spent: the document of `gorgon plan --json`.

        Raises InputInvalid.
        """
        values = lazy.load("gorgon_common.workflow.compiler:check_inputs")(plan, inputs)
        estimating = lazy.load("gorgon_common.engine.estimate")
        history = lazy.load("gorgon_common.persistence.history:read_history")(
            self.database, self.knowledge.plan, workflow=plan.name, target=target
        )
        book = quota_book(self.settings, self.database)
        tokens = lazy.load("gorgon_common.costs.tokens")
        document: dict[str, Any] = estimating.estimate(
            plan,
            values,
            target=target,
            history=history,
            estimator=tokens.TokenEstimator(
                self.reports.ratios(target), unseen=tokens.SANDBOX_FACTOR if target == "sandbox" else 1.0
            ),
            prices=lazy.load("gorgon_common.costs.prices:make_pricer")(self.settings.prices),
            quota=lambda provider, model: book.quota(LimitKey(target, provider, "", model)),
            budgets=estimating.left(self.list_budgets(), team=team or plan.team, workflow=plan.name, target=target),
            latency=self.settings.sandbox_latency,
            slots=self.settings.slots,
        )
        return document

    def explain(self, run_id: str, step: str | None = None) -> dict[str, Any]:
        """Return what a run (or a step of it) waits for, what its money was spent on, and how long its parts took.

        Raises NotFound.
        """
        explanations = lazy.load("gorgon_common.persistence.explain:Explanations")(self.database, self.knowledge.plan)
        document: dict[str, Any] = explanations.explain(run_id, step)
        return document

    def set_budget(
        self,
        scope: str,
        *,
        period: str = "month",
        timezone: str | None = None,
        usd: Any = UNCHANGED,
        tokens: Any = UNCHANGED,
    ) -> dict[str, Any]:
        """Set what an org, a team or a workflow may spend per run, day or month; returns the budget.

        `scope`: org, team:NAME or workflow:NAME.  `usd`: dollars, exact as text; None removes the limit.  `timezone`:
        the time zone in which days begin, UTC for a new budget.  Raises InputInvalid.
        """
        return self.budgets.change(scope, period=period, timezone=timezone, usd=usd, tokens=tokens)

    def list_budgets(self) -> list[dict[str, Any]]:
        """Return every budget with its accounts of the current period, one for each target that has spent.

        `{scope, name, period, timezone, usd_limit, token_limit, accounts: [{label, target, starts_at, ends_at,
        usd_spent, usd_reserved, usd_overrun, token_spent, token_reserved, token_overrun}]}`, in micro-dollars.
        """
        return self.budgets.listing()

    def limits(self) -> dict[str, Any]:
        """Return `{gates, rules, estimates}`.

        These are the recent use of each model's rate limits, the limits set by people, and the accuracy of input token
        estimates.
        """
        limiter, _ = make_limiter(self.settings, self.database)
        try:
            gates = limiter.snapshot()
        finally:
            limiter.close()
        rules = [
            {"provider": provider, "model": model, "limits": limits}
            for provider, model, limits in LimitRules(self.database).all()
        ]
        estimator = lazy.load("gorgon_common.costs.tokens:TokenEstimator")
        estimates = [
            {"target": target, **seen}
            for target in TARGETS
            for seen in estimator(self.reports.ratios(target)).describe()
        ]
        return {"gates": gates, "rules": rules, "estimates": estimates}

    def set_limits(
        self, provider: str, model: str, limits: Mapping[str, float], *, clear: bool = False
    ) -> dict[str, Any]:
        """Set limits for a provider's models (patterns); `clear`: first delete the limits that were set for them.

        Returns `{provider, model, limits, cleared}`: the limits now in place, and whether any were deleted.  Raises
        InputInvalid.
        """
        try:
            values = checked(provider, limits)
        except ValueError as error:
            raise InputInvalid(
                f"The limit cannot be set: {error}.",
                hint="Limits count per minute.  --clear takes away what was set for a model.",
            ) from None
        rules = LimitRules(self.database)
        cleared = rules.clear(provider, model) if clear else False
        if values:
            rules.set(provider, model, values)
        kept = next((body for name, pattern, body in rules.all() if (name, pattern) == (provider, model)), {})
        return {"provider": provider, "model": model, "limits": kept, "cleared": cleared}

    def health(self) -> dict[str, Any]:
        """Return `{database: {ok, detail}, broker: {ok, detail}}`."""
        return {"database": _checked(self._database), "broker": _checked(self.canvas("live").health)}

    def measure(self) -> None:
        """Set the gauges of queued work and of workers, for `metrics.watch`."""
        try:
            waiting = self.store.shelved()
            slots = {target: self.store.slots(target, "") for target in TARGETS}
        except GorgonError:
            return  # the gauges keep their values
        for number, queue in enumerate(queues.ALL):
            metrics.BACKLOG.set(waiting.get(number, 0), queue=queue)
            for target, live in slots.items():
                metrics.SLOTS.set(live.get(number, 0), target=target, queue=queue)

    def _database(self) -> str:
        migrate.check(self.database)
        return self.database.engine.url.render_as_string(hide_password=True)

    def close(self) -> None:
        """Release connections."""
        for canvas in self._canvases.values():
            canvas.close()
        self.app.close()
        self.budgets.close()
        self.store.close()


def _checked(check: Any) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": check()}
    except GorgonError as error:
        return {"ok": False, "detail": error.message, "hint": error.hint or None}


def _broker(settings: Settings) -> str:
    """Return the broker's URL; each embedded application has a broker of its own."""
    return f"gmem://{new_id('app').lower()}" if settings.embedded else settings.broker_url


def quota_book(settings: Settings, database: Database) -> QuotaBook:
    """Return the configured quotas.  Raises ConfigurationError if GORGON_LIMITS_FILE is invalid."""
    rules = LimitRules(database)
    return QuotaBook(
        read_limits(settings.limits_file),
        stored=lambda: [Rule(*entry) for entry in rules.all()],
        official=lambda provider: provider not in SERVERS or SERVERS[provider].official(settings),
    )


def make_limiter(settings: Settings, database: Database) -> tuple[Limiter, QuotaBook]:
    """Return this process's limiter, in Redis if there is one, and the quotas it applies.

    Raises ConfigurationError if GORGON_LIMITS_FILE is invalid.
    """
    book = quota_book(settings, database)
    worker = f"{socket.gethostname()}:{os.getpid()}:{new_id('lim')}"
    if settings.redis_url is None:
        return StoredLimiter(LimitStates(database), book, worker=worker), book
    shared = lazy.load("gorgon_common.ratelimit.redis:RedisLimiter")(settings.redis_url, book, worker=worker)
    return lazy.load("gorgon_common.ratelimit.failover:SturdyLimiter")(shared, book, worker=worker), book


def build(settings: Settings, *, events: bool = False, app: Any = None) -> Services:
    """Wire the services for these settings.  The database is migrated if it is SQLite, and checked if it is PostgreSQL.

    `events`: send the task events that Flower shows.  `app`: an existing Celery application.  Raises
    ConfigurationError, Unavailable.
    """
    settings.register_secrets()
    protect(settings.home, make="database_url" not in settings.model_fields_set)
    if settings.database_url.startswith("sqlite"):
        migrate.upgrade(settings.database_url)
    database = Database(settings.database_url)
    try:
        migrate.check(database)
    except (GorgonError, Unavailable):
        database.close()
        raise
    return Services(settings, database, events=events, app=app)
