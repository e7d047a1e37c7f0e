"""From an error and a step's policy to an outcome: wait, another attempt, the step's own way out, or failure.

Nothing in here calls, waits or writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gorgon_common.engine import kinds, limits, reporting, retry
from gorgon_common.engine.budget import Short
from gorgon_common.engine.kinds import composite
from gorgon_common.engine.kinds.base import StepContext
from gorgon_common.engine.outcomes import BUDGET, RETRY, Done, Failed, Outcome, Parked
from gorgon_common.engine.states import StepStatus
from gorgon_common.errors import (
    BudgetExceeded,
    Cancelled,
    ExpressionError,
    GorgonError,
    RateLimited,
    Retryable,
    StepError,
    Throttled,
    Unavailable,
    UserError,
)

HANDLED = (StepError, ExpressionError, UserError, Throttled, Cancelled, Short)
"""What a step may raise.  Anything else is a fault of this process, or of the database."""
RATE_LIMIT_PAUSE = 1.0
"""Seconds to wait after a 429 that does not say how long."""
AWAY_PAUSE = 1.0
"""Seconds until a step is taken up again that could not go on because the database was away."""


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The retries are spent, and the step names another model for one more attempt (`fallback: {type: model}`)."""

    model: str
    error: Mapping[str, Any]


def outcome(context: StepContext, error: GorgonError) -> Outcome | OtherModel:
    """Return what becomes of a step whose attempt raised one of HANDLED."""
    match error:
        case Cancelled():
            return Done(context.result(StepStatus.CANCELLED, reason="the run was stopped"))
        case Short():
            reporting.over_budget(context.run, context.step, error.message, waits=True)
            room = error.room if error.room.period else None
            return _wait(context, error.seconds, BUDGET, error.message, room=room)
        case Throttled():
            return _wait(context, error.seconds, error.reason, error.message)
        case RateLimited():
            pause = error.retry_after if error.retry_after is not None else RATE_LIMIT_PAUSE
            pause += 0.1 * context.services.chance()
            return Parked(pause, limits.RETRY_AFTER, f"rate limit: {error.message}", context.paid(), attempt=False)
        case Unavailable():
            return Parked(AWAY_PAUSE, RETRY, error.message, context.paid(), attempt=False)
        case BudgetExceeded():
            reporting.over_budget(context.run, context.step, error.message, waits=False)
        case StepError() if retry.again(context.node.retry, error, context.step.attempt):
            return _retry(context, error)
    return way_out(context, _final(context, error))


def _final(context: StepContext, error: GorgonError) -> dict[str, Any]:
    """Return an error after which no attempt follows, as data."""
    found = context.error_data(error)
    if isinstance(error, StepError) and error.retryable and not found["hint"]:
        tries = "once" if context.step.attempt == 1 else f"{context.step.attempt} times"
        found["hint"] = f"The step was tried {tries}. Raise its `max_retries:`, or continue the run later."
    return found


def _wait(context: StepContext, seconds: float, reason: str, message: str, **fields: Any) -> Parked:
    """There is no room for the call now: the step gives its slot back and comes again, which is no attempt."""
    left = context.seconds_left()
    seconds = seconds if left is None else max(0.0, min(seconds, left))
    return Parked(seconds, reason, message, context.paid(), attempt=False, **fields)


def _retry(context: StepContext, error: StepError) -> Outcome | OtherModel:
    if isinstance(error, Retryable):
        context.budget.try_again()
    seconds = retry.delay(context.node.retry, context.step.attempt, context.services.chance)
    left = context.seconds_left()
    if left is not None and seconds >= left:
        return way_out(context, context.error_data(error))
    took = (context.services.clock.now() - context.started_at).total_seconds()
    return Parked(seconds, RETRY, error.message, context.paid(), kind=error.kind, took=max(0.0, took))


def way_out(context: StepContext, error: dict[str, Any]) -> Outcome | OtherModel:
    """The retries are spent: do as `on_failure:` says."""
    chosen = context.node.on_failure
    match chosen.action:
        case "skip":
            result = context.result(StepStatus.SKIPPED, error=error, reason=f"it failed: {error['message']}")
            return Done(result, context.run.descendants(context.step, failed=False))
        case "default":
            detail = {"fallback": error["message"]}
            return Done(context.result(StepStatus.SUCCEEDED, chosen.value, detail=detail))
        case "step" if context.fallback() is None:
            expanded = composite.fallback(context.run, context.step, error)
            return replace(expanded, result=context.result(StepStatus.FAILED, error=error))
        case "model" if chosen.model is not None:
            return OtherModel(chosen.model, error)
    return fatal(context, error)


def fatal(context: StepContext, error: Mapping[str, Any]) -> Outcome:
    """The step has failed for good.  Its composite goes on, or the run comes to its end."""
    result = context.result(StepStatus.FAILED, error=error)
    alone = Done(result, context.run.descendants(context.step, failed=True))
    if context.step.parent is None:
        return alone if context.node.phase != "main" else Failed(result, context.run.gate, run_fails=True)
    number, _, _ = context.run.place(context.step.parent)
    around = context.run.plan.nodes[number]
    if kinds.handler(around.kind).stops_at_failure(around):
        return Failed(result, context.step.parent, run_fails=False)
    return alone
