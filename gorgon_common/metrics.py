"""Every Prometheus metric of Gorgon, in one list, and how `telemetry` events update them.

    telemetry.subscribe(metrics.record)

prometheus-client is imported when the first value is recorded.  Durations are in seconds, money is in US dollars.  If
PROMETHEUS_MULTIPROC_DIR names a directory, the processes that share it have one exposition: each of them reports the
values of all.
"""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gorgon_common import lazy, telemetry

MULTIPROCESS = "PROMETHEUS_MULTIPROC_DIR"
_MICRO = 1_000_000
_DURATIONS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.  `kind` is `Counter`, `Gauge` or `Histogram`.

    `across`: how the values of a gauge in several processes are combined (`multiprocess_mode` of prometheus-client).
    """

    kind: str
    name: str
    help: str
    labels: tuple[str, ...] = ()
    across: str = "livesum"

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Increment (counters and gauges)."""
        self._child(labels).inc(amount)

    def set(self, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(labels).set(value)

    def observe(self, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._child(labels).observe(value)

    def clear(self) -> None:
        """Remove every label.  With several processes the labels stay, because their files cannot be truncated."""
        if not multiprocess():
            _made(self).clear()
            for key in [key for key in list(_children) if key[0] == self.name]:
                _children.pop(key, None)

    def _child(self, labels: dict[str, str]) -> Any:
        if not self.labels:
            return _made(self)
        key = (self.name, *labels.items())
        child = _children.get(key)  # the client library's own lookup takes ten times as long
        if child is None:
            child = _children[key] = _made(self).labels(**labels)
        return child


RUNS_ACCEPTED = Metric("Counter", "gorgon_runs_accepted", "Runs that were accepted.", ("workflow", "team", "target"))
RUNS = Metric("Counter", "gorgon_runs", "Runs that ended.", ("workflow", "team", "target", "status"))
RUN_SECONDS = Metric("Histogram", "gorgon_run_seconds", "Time of a run, from its creation.", ("workflow", "target"))
STEPS = Metric("Counter", "gorgon_steps", "Steps that ended.", ("workflow", "kind", "queue", "status"))
STEP_SECONDS = Metric("Histogram", "gorgon_step_seconds", "Time of one attempt.", ("kind", "queue"))
CLAIMS = Metric("Counter", "gorgon_step_claims", "Steps that a worker took.", ("queue",))
STARTS = Metric("Counter", "gorgon_step_starts", "Attempts that began.", ("kind", "queue"))
WAITS = Metric("Counter", "gorgon_step_waits", "Steps that had to wait, by what for.", ("queue", "why"))
RETRIES = Metric(
    "Counter", "gorgon_step_retries", "Attempts that failed and were followed by another.", ("queue", "reason")
)
CALLS = Metric("Counter", "gorgon_calls", "Calls to models that are over.", ("provider", "model", "target", "outcome"))
CALLS_SENT = Metric("Counter", "gorgon_calls_sent", "Calls to models that were begun.", ("provider", "model", "target"))
CALL_SECONDS = Metric("Histogram", "gorgon_call_seconds", "Time of one call.", ("provider", "model", "target"))
CALLS_HELD = Metric(
    "Counter",
    "gorgon_calls_held",
    "Calls that the limiter did not let in at once.",
    ("provider", "model", "target", "why"),
)
UNPRICED = Metric("Counter", "gorgon_unpriced_calls", "Calls of unknown cost.", ("provider", "model", "target"))
TOKENS = Metric(
    "Counter", "gorgon_tokens", "Tokens used.", ("provider", "model", "role", "team", "target", "direction")
)
COST = Metric("Counter", "gorgon_cost_usd", "Known cost of calls.", ("provider", "model", "role", "team", "target"))
BREAKER = Metric(
    "Gauge",
    "gorgon_breaker_open",
    "1 where the circuit breaker of a model is open, as this process last saw it.",
    ("provider", "model", "target"),
    "livemax",
)
FENCED = Metric(
    "Counter", "gorgon_fenced_finishes", "Results that came from a worker that had lost its step.", ("queue",)
)
RECOVERED = Metric("Counter", "gorgon_recovered_steps", "Steps taken from dead workers or lost messages.", ("reason",))
SLOTS_BUSY = Metric("Gauge", "gorgon_slots_busy", "Steps that workers run now.", ("queue",))
BACKLOG = Metric(
    "Gauge", "gorgon_backlog_steps", "Ready steps that wait for room in their queue.", ("queue",), "mostrecent"
)
SLOTS = Metric("Gauge", "gorgon_worker_slots", "Slots of the workers that live.", ("target", "queue"), "mostrecent")
BUDGET_REFUSALS = Metric(
    "Counter", "gorgon_budget_refusals", "Calls that a budget had no room for.", ("workflow", "team", "way")
)
BUDGET_USD = Metric(
    "Gauge",
    "gorgon_budget_usd",
    "Budgets in dollars, of the present period.",
    ("budget", "per", "target", "is"),
    "mostrecent",
)
BUDGET_TOKENS = Metric(
    "Gauge",
    "gorgon_budget_tokens",
    "Budgets in tokens, of the present period.",
    ("budget", "per", "target", "is"),
    "mostrecent",
)
BUDGET_ALERTS = Metric(
    "Counter", "gorgon_budget_alerts", "Marks that budgets have reached, and calls beyond.", ("budget", "kind", "mark")
)
REQUESTS = Metric("Counter", "gorgon_http_requests", "Requests that the API answered.", ("method", "route", "status"))
REQUEST_SECONDS = Metric("Histogram", "gorgon_http_request_seconds", "Time to answer a request.", ("method", "route"))

ALL = (
    RUNS_ACCEPTED,
    RUNS,
    RUN_SECONDS,
    STEPS,
    STEP_SECONDS,
    CLAIMS,
    STARTS,
    WAITS,
    RETRIES,
    CALLS,
    CALLS_SENT,
    CALL_SECONDS,
    CALLS_HELD,
    UNPRICED,
    TOKENS,
    COST,
    BREAKER,
    FENCED,
    RECOVERED,
    SLOTS_BUSY,
    BACKLOG,
    SLOTS,
    BUDGET_REFUSALS,
    BUDGET_USD,
    BUDGET_TOKENS,
    BUDGET_ALERTS,
    REQUESTS,
    REQUEST_SECONDS,
)


def record(event: telemetry.Event) -> None:
    """Count an event; for `telemetry.subscribe`."""
    _RECORDERS[type(event)](event)


def _run_created(event: telemetry.RunCreated) -> None:
    RUNS_ACCEPTED.inc(workflow=event.run.workflow, team=event.run.team, target=event.run.target)


def _run_ended(event: telemetry.RunEnded) -> None:
    run = event.run
    RUNS.inc(workflow=run.workflow, team=run.team, target=run.target, status=event.status)
    RUN_SECONDS.observe(event.seconds, workflow=run.workflow, target=run.target)


def _step_claimed(event: telemetry.StepClaimed) -> None:
    CLAIMS.inc(queue=event.step.queue)


def _step_started(event: telemetry.StepStarted) -> None:
    STARTS.inc(kind=event.step.kind, queue=event.step.queue)


def _step_parked(event: telemetry.StepParked) -> None:
    step = event.step
    WAITS.inc(queue=step.queue, why=event.why)
    if event.attempt:
        RETRIES.inc(queue=step.queue, reason=event.kind or event.why)
        if event.took is not None:
            STEP_SECONDS.observe(event.took, kind=step.kind, queue=step.queue)


def _step_ended(event: telemetry.StepEnded) -> None:
    step = event.step
    STEPS.inc(workflow=step.run.workflow, kind=step.kind, queue=step.queue, status=event.status)
    if event.seconds is not None and event.status != "skipped":
        STEP_SECONDS.observe(event.seconds, kind=step.kind, queue=step.queue)


def _step_fenced(event: telemetry.StepFenced) -> None:
    FENCED.inc(queue=event.step.queue)


def _step_recovered(event: telemetry.StepRecovered) -> None:
    RECOVERED.inc(reason=event.why)


def _call_sent(event: telemetry.CallSent) -> None:
    CALLS_SENT.inc(provider=event.provider, model=event.model, target=event.target)


def _call_refused(event: telemetry.CallRefused) -> None:
    CALLS_HELD.inc(provider=event.provider, model=event.model, target=event.target, why=event.why)


def _call_settled(event: telemetry.CallSettled) -> None:
    run = event.step.run
    model = {"provider": event.provider, "model": event.model}
    payer = {**model, "role": event.step.role or "", "team": run.team, "target": run.target}
    CALLS.inc(1, **model, target=run.target, outcome=event.outcome)
    CALL_SECONDS.observe(event.seconds, **model, target=run.target)
    TOKENS.inc(event.input_tokens, **payer, direction="input")
    TOKENS.inc(event.output_tokens, **payer, direction="output")
    if event.cost is None:
        UNPRICED.inc(1, **model, target=run.target)
    else:
        COST.inc(event.cost / _MICRO, **payer)


def _breaker_changed(event: telemetry.BreakerChanged) -> None:
    BREAKER.set(float(event.open), provider=event.provider, model=event.model, target=event.target)


def _budget_refused(event: telemetry.BudgetRefused) -> None:
    run = event.step.run
    BUDGET_REFUSALS.inc(workflow=run.workflow, team=run.team, way="waits" if event.waits else "fails")


_RECORDERS: dict[type, Callable[[Any], None]] = {
    telemetry.RunCreated: _run_created,
    telemetry.RunEnded: _run_ended,
    telemetry.StepClaimed: _step_claimed,
    telemetry.StepStarted: _step_started,
    telemetry.StepParked: _step_parked,
    telemetry.StepEnded: _step_ended,
    telemetry.StepFenced: _step_fenced,
    telemetry.StepRecovered: _step_recovered,
    telemetry.CallSent: _call_sent,
    telemetry.CallRefused: _call_refused,
    telemetry.CallSettled: _call_settled,
    telemetry.BreakerChanged: _breaker_changed,
    telemetry.BudgetRefused: _budget_refused,
}

_lock = threading.Lock()
_registry: list[Any] = []
_collectors: dict[str, Any] = {}
_children: dict[tuple[Any, ...], Any] = {}
"""(Name, labels) → the client library's object."""
_sources: list[Callable[[], Callable[[], None] | None]] = []


def _made(metric: Metric) -> Any:
    """Return the client library's object for a metric, created on first use."""
    collector = _collectors.get(metric.name)
    if collector is None:
        with _lock:
            collector = _collectors.get(metric.name)
            if collector is None:
                extra: dict[str, Any] = {"buckets": _DURATIONS} if metric.kind == "Histogram" else {}
                if metric.kind == "Gauge":
                    extra["multiprocess_mode"] = metric.across
                make = lazy.load(f"prometheus_client:{metric.kind}")
                collector = make(metric.name, metric.help, metric.labels, registry=_get_registry(), **extra)
                _collectors[metric.name] = collector
    return collector


def _get_registry() -> Any:
    if not _registry:
        _registry.append(lazy.load("prometheus_client:CollectorRegistry")())
    return _registry[0]


def watch(source: Callable[[], None]) -> None:
    """Call a function before each exposition, to set gauges from data stored elsewhere.  It must not raise.

    A method is called only while its object exists.
    """
    known: Callable[[], Callable[[], None] | None]
    known = weakref.WeakMethod(source) if inspect.ismethod(source) else lambda: source
    with _lock:
        _sources.append(known)


def unwatch(source: Callable[[], None]) -> None:
    """Stop calling a function that `watch` registered."""
    with _lock:
        _sources[:] = [known for known in _sources if known() not in (None, source)]


def multiprocess() -> bool:
    """Return whether several processes share one exposition."""
    return bool(os.environ.get(MULTIPROCESS))


def close() -> None:
    """Finish this process's metrics.  With several processes, its gauges of current activity stop counting."""
    if multiprocess():
        lazy.load("prometheus_client.multiprocess:mark_process_dead")(os.getpid())


def exposition() -> bytes:
    """Return every metric in Prometheus's text format, for this process or for all that share a directory."""
    for metric in ALL:
        _made(metric)
    for known in list(_sources):
        source = known()
        if source is not None:
            source()
    registry = _get_registry()
    if multiprocess():
        registry = lazy.load("prometheus_client:CollectorRegistry")()
        lazy.load("prometheus_client.multiprocess:MultiProcessCollector")(registry)
    text: bytes = lazy.load("prometheus_client:generate_latest")(registry)
    return text
