"""Every Prometheus metric of Gorgon, in one list.

prometheus-client is imported by the first value that is recorded.  Durations are in seconds, money is in US dollars.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gorgon_common import lazy

_DURATIONS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.  `kind` is `Counter`, `Gauge` or `Histogram`."""

    kind: str
    name: str
    help: str
    labels: tuple[str, ...] = ()

    def inc(self, amount: float = 1, **labels: str) -> None:
        """Count up (counters and gauges)."""
        self._child(labels).inc(amount)

    def set(self, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(labels).set(value)

    def observe(self, value: float, **labels: str) -> None:
        """Add a value to a histogram."""
        self._child(labels).observe(value)

    def clear(self) -> None:
        """Forget every label."""
        _made(self).clear()

    def _child(self, labels: dict[str, str]) -> Any:
        made = _made(self)
        return made.labels(**labels) if self.labels else made


RUNS = Metric("Counter", "gorgon_runs", "Runs that ended.", ("workflow", "status"))
STEPS = Metric("Counter", "gorgon_steps", "Steps that ended.", ("workflow", "kind", "queue", "status"))
STEP_SECONDS = Metric("Histogram", "gorgon_step_seconds", "Time of one attempt.", ("kind", "queue"))
RETRIES = Metric("Counter", "gorgon_step_retries", "Attempts after the first.", ("queue", "reason"))
TOKENS = Metric("Counter", "gorgon_tokens", "Tokens used.", ("provider", "model", "role", "direction"))
COST = Metric("Counter", "gorgon_cost_usd", "Money spent on models.", ("provider", "model", "role"))
FENCED = Metric(
    "Counter", "gorgon_fenced_finishes", "Results that came from a worker that had lost its step.", ("queue",)
)
RECOVERED = Metric("Counter", "gorgon_recovered_steps", "Steps taken from dead workers or lost messages.", ("reason",))
SLOTS_BUSY = Metric("Gauge", "gorgon_slots_busy", "Steps that this worker runs now.", ("queue",))
BUDGET_USD = Metric(
    "Gauge", "gorgon_budget_usd", "Budgets in dollars, of the present period.", ("budget", "per", "target", "is")
)
BUDGET_TOKENS = Metric(
    "Gauge", "gorgon_budget_tokens", "Budgets in tokens, of the present period.", ("budget", "per", "target", "is")
)
BUDGET_ALERTS = Metric(
    "Counter", "gorgon_budget_alerts", "Marks that budgets have reached, and calls beyond.", ("budget", "kind", "mark")
)

ALL = (
    RUNS,
    STEPS,
    STEP_SECONDS,
    RETRIES,
    TOKENS,
    COST,
    FENCED,
    RECOVERED,
    SLOTS_BUSY,
    BUDGET_USD,
    BUDGET_TOKENS,
    BUDGET_ALERTS,
)

_lock = threading.Lock()
_registry: list[Any] = []
_collectors: dict[str, Any] = {}
_sources: list[weakref.WeakMethod[Callable[[], None]]] = []


def _made(metric: Metric) -> Any:
    """Return the client's object for a metric, made at its first use."""
    collector = _collectors.get(metric.name)
    if collector is None:
        with _lock:
            collector = _collectors.get(metric.name)
            if collector is None:
                extra = {"buckets": _DURATIONS} if metric.kind == "Histogram" else {}
                make = lazy.load(f"prometheus_client:{metric.kind}")
                collector = make(metric.name, metric.help, metric.labels, registry=_get_registry(), **extra)
                _collectors[metric.name] = collector
    return collector


def _get_registry() -> Any:
    if not _registry:
        _registry.append(lazy.load("prometheus_client:CollectorRegistry")())
    return _registry[0]


def watch(source: Callable[[], None]) -> None:
    """Call a method before each exposition, as long as its object lives: it sets gauges of what is elsewhere.

    It must not raise.
    """
    with _lock:
        _sources.append(weakref.WeakMethod(source))


def unwatch(source: Callable[[], None]) -> None:
    """Call it no more."""
    with _lock:
        _sources[:] = [known for known in _sources if known() not in (None, source)]


def exposition() -> bytes:
    """Return every metric of this process in Prometheus' text format."""
    for metric in ALL:
        _made(metric)
    for known in list(_sources):
        source = known()
        if source is not None:
            source()
    text: bytes = lazy.load("prometheus_client:generate_latest")(_get_registry())
    return text
