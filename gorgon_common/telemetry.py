"""Events of a process, emitted at the boundaries of the engine; metrics and logs subscribe to them.

    telemetry.subscribe(metrics.record)
    telemetry.emit(telemetry.StepEnded(step, status="succeeded", seconds=0.4))

An event is emitted after the commit of its transaction, in the same thread.  A subscriber must be quick and must not
raise; an exception is logged and goes no further, because no step may fail because of a metric.  Without subscribers an
event costs one comparison: call `active()` before collecting data that only an event needs.  Times are in seconds,
money is in micro-dollars.
"""

from __future__ import annotations

import logging
import re
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")


@dataclass(frozen=True, slots=True)
class RunRef:
    """A run, as named in events."""

    run_id: str
    workflow: str
    team: str
    target: str
    trace_id: str | None = None


@dataclass(frozen=True, slots=True)
class StepRef:
    """A step of a run, as named in events.

    `step` is its path (`build[3]/review#2`).  `attempt` counts from 1.  `slow`: it takes a slot of its worker.
    """

    run: RunRef
    step: str
    kind: str
    queue: str
    role: str | None
    attempt: int
    slow: bool


@dataclass(frozen=True, slots=True)
class RunCreated:
    """A run was accepted and stored.  `resumes`: it continues an earlier one."""

    run: RunRef
    resumes: bool = False


@dataclass(frozen=True, slots=True)
class RunEnded:
    """A run has ended: succeeded, failed or cancelled.  `seconds`: the time since it was created."""

    run: RunRef
    status: str
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepClaimed:
    """This worker has claimed a step."""

    step: StepRef


@dataclass(frozen=True, slots=True)
class StepStarted:
    """Work on a step begins."""

    step: StepRef


@dataclass(frozen=True, slots=True)
class StepParked:
    """A step waits, for one of `engine.outcomes.REASONS`.

    `attempt`: an attempt has failed and there will be another one; then `kind` is the kind of error, and `took` the
    duration of the attempt.
    """

    step: StepRef
    why: str
    wait: float
    message: str
    attempt: bool
    kind: str = ""
    took: float | None = None


@dataclass(frozen=True, slots=True)
class StepEnded:
    """A step has ended: succeeded, failed, skipped or cancelled.  `seconds`: its last attempt, None if there was none.

    `error` says why it failed, `kind` is its error kind; `reason` says why it was skipped or cancelled.
    """

    step: StepRef
    status: str
    seconds: float | None = None
    error: str | None = None
    kind: str = ""
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class StepFenced:
    """A result was refused: another worker holds the step, or it has ended."""

    step: StepRef


@dataclass(frozen=True, slots=True)
class StepRecovered:
    """A step was taken back.  `why`: worker_died, message_lost, or stray (held by this worker, but not being run)."""

    step: StepRef
    why: str


@dataclass(frozen=True, slots=True)
class CallSent:
    """A call to a model begins: the limiter admitted it."""

    provider: str
    model: str
    target: str
    team: str


@dataclass(frozen=True, slots=True)
class CallRefused:
    """The limiter did not admit a call.  `why`: see `engine.limits.Wait`, or `over_limit`: it can never be admitted."""

    provider: str
    model: str
    target: str
    team: str
    why: str
    wait: float | None


@dataclass(frozen=True, slots=True)
class CallSettled:
    """A call to a model has ended.  `outcome`: see `costs.usage.CallRecord`; `cost`: None if it is unknown."""

    step: StepRef
    provider: str
    model: str
    outcome: str
    seconds: float
    input_tokens: int
    output_tokens: int
    cost: int | None


@dataclass(frozen=True, slots=True)
class BreakerChanged:
    """This worker has seen a model's circuit breaker open or close; `seconds`: for how long it stays open."""

    provider: str
    model: str
    target: str
    open: bool
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class BudgetRefused:
    """A budget had no room for a call.  `waits`: the step waits for room; otherwise it fails."""

    step: StepRef
    message: str
    waits: bool


Event = (
    RunCreated
    | RunEnded
    | StepClaimed
    | StepStarted
    | StepParked
    | StepEnded
    | StepFenced
    | StepRecovered
    | CallSent
    | CallRefused
    | CallSettled
    | BreakerChanged
    | BudgetRefused
)
Subscriber = Callable[[Event], None]

_log = logging.getLogger(__name__)
_lock = threading.Lock()


class _State:
    """The subscribers; replaced as a whole, so that `emit` needs no lock."""

    subscribers: tuple[Subscriber, ...] = ()


def subscribe(subscriber: Subscriber) -> None:
    """Call a function with every event of this process from now on; only once, however often it is subscribed."""
    with _lock:
        if subscriber not in _State.subscribers:
            _State.subscribers = (*_State.subscribers, subscriber)


def unsubscribe(subscriber: Subscriber) -> None:
    """Stop calling a subscriber."""
    with _lock:
        _State.subscribers = tuple(known for known in _State.subscribers if known != subscriber)


def active() -> bool:
    """Return whether there are any subscribers."""
    return bool(_State.subscribers)


def emit(event: Event) -> None:
    """Call every subscriber."""
    for subscriber in _State.subscribers:
        try:
            subscriber(event)
        except Exception:  # noqa: BLE001  no step may fail for a figure or a line
            _log.exception("a subscriber failed at %s", type(event).__name__)


# Traces


def new_trace_id() -> str:
    """Return a new trace id: 32 hexadecimal digits, random (W3C Trace Context)."""
    return secrets.token_hex(16)


def trace_of(traceparent: str | None) -> str | None:
    """Return the trace id of a `traceparent` header; None if it is missing or invalid (W3C Trace Context)."""
    found = _TRACEPARENT.fullmatch((traceparent or "").strip())
    if found is None or not found[1].strip("0") or not found[2].strip("0"):
        return None
    version_00 = (traceparent or "").strip().startswith("00-")
    return None if version_00 and found[3] else found[1]
