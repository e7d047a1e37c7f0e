"""What happens in a process, as named events at the boundaries of the engine; metrics and logs subscribe to them.

    telemetry.subscribe(metrics.record)
    telemetry.emit(telemetry.StepEnded(step, status="succeeded", seconds=0.4))

An event is emitted after the transaction that made it true, in the thread that made it.  A subscriber must be quick and
must not raise; what it raises is logged and goes no further, because no step may fail for a figure.  Without
subscribers an event costs a comparison: ask `active()` before gathering what only an event needs.  Times are in
seconds, money is in micro-dollars.
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
    """A run, as events name it."""

    run_id: str
    workflow: str
    team: str
    target: str
    trace_id: str | None = None


@dataclass(frozen=True, slots=True)
class StepRef:
    """A step of a run, as events name it.

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
    """A run has ended: succeeded, failed or cancelled.  `seconds` since it was created."""

    run: RunRef
    status: str
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class StepClaimed:
    """This worker holds a step now."""

    step: StepRef


@dataclass(frozen=True, slots=True)
class StepStarted:
    """Work on a step begins."""

    step: StepRef


@dataclass(frozen=True, slots=True)
class StepParked:
    """A step waits, for one of `engine.outcomes.REASONS`.

    `attempt`: an attempt has failed and there will be another; `kind` is then what went wrong, and `took` how long the
    attempt was.
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
    """A step has ended: succeeded, failed, skipped or cancelled.  `seconds`: its last attempt, None where it had none.

    `error` says why it failed, `kind` in one word; `reason` why it was skipped or cancelled.
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
    """A step was taken back.  `why`: worker_died, message_lost, or stray (held by this worker, and nobody ran it)."""

    step: StepRef
    why: str


@dataclass(frozen=True, slots=True)
class CallSent:
    """A call to a model begins: the limiter let it in."""

    provider: str
    model: str
    target: str
    team: str


@dataclass(frozen=True, slots=True)
class CallRefused:
    """The limiter did not let a call in.  `why`: see `engine.limits.Wait`, or `over_limit`: it never will."""

    provider: str
    model: str
    target: str
    team: str
    why: str
    wait: float | None


@dataclass(frozen=True, slots=True)
class CallSettled:
    """A call to a model is over.  `outcome`: see `costs.usage.CallRecord`; `cost`: None where nobody knows it."""

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
    """This worker sees that the circuit breaker of a model has opened or closed; `seconds`: for how long it is open."""

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
    """Who listens; replaced as a whole, so that `emit` needs no lock."""

    subscribers: tuple[Subscriber, ...] = ()


def subscribe(subscriber: Subscriber) -> None:
    """Call it with every event of this process from now on; once, however often it is subscribed."""
    with _lock:
        if subscriber not in _State.subscribers:
            _State.subscribers = (*_State.subscribers, subscriber)


def unsubscribe(subscriber: Subscriber) -> None:
    """Call it no more."""
    with _lock:
        _State.subscribers = tuple(known for known in _State.subscribers if known != subscriber)


def active() -> bool:
    """Tell whether anybody listens."""
    return bool(_State.subscribers)


def emit(event: Event) -> None:
    """Tell every subscriber."""
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
    """Return the trace id of a `traceparent` header, None where it is missing or not valid (W3C Trace Context)."""
    found = _TRACEPARENT.fullmatch((traceparent or "").strip())
    if found is None or not found[1].strip("0") or not found[2].strip("0"):
        return None
    version_00 = (traceparent or "").strip().startswith("00-")
    return None if version_00 and found[3] else found[1]
