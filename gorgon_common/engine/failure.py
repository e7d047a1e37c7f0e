"""Maps an error and the step's policy to an outcome: wait, retry, fall back or fail.

Nothing in this module makes a call, blocks or writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gorgon_common.engine import kinds, limits, reporting, retry
from gorgon_common.engine.budget import BudgetWait
from gorgon_common.engine.kinds import composite
from gorgon_common.engine.kinds.base import StepContext
from gorgon_common.engine.outcomes import BUDGET, RETRY, Done, Failed, Outcome, Snoozed
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

HANDLED = (StepError, ExpressionError, UserError, Throttled, Cancelled, BudgetWait)
"""What a step may raise.  Any other exception is a fault of this process or of the database."""
RATE_LIMIT_PAUSE = 1.0
"""Seconds to wait after a 429 without a `retry-after`."""
AWAY_PAUSE = 1.0
"""Seconds until a step that was interrupted by an unavailable database is tried again."""


@dataclass(frozen=True, slots=True)
class OtherModel:
    """The retries are exhausted, and the step names another model for one more attempt (`fallback: {type: model}`)."""

    model: str
    error: Mapping[str, Any]


def outcome(context: StepContext, error: GorgonError) -> Outcome | OtherModel:
    """Return the outcome of a step whose attempt raised one of HANDLED, or Unavailable after calls were paid for."""
    match error:
        case Cancelled():
            return Done(context.result(StepStatus.CANCELLED, reason="the run was stopped"))
        case BudgetWait():
            reporting.over_budget(context.run, context.step, error.message, waits=True)
            room = error.room if error.room.period else None
            return _wait(context, error.seconds, BUDGET, error.message, room=room)
        case Throttled():
            return _wait(context, error.seconds, error.reason, error.message)
        case RateLimited():
            pause = error.retry_after if error.retry_after is not None else RATE_LIMIT_PAUSE
            pause += 0.1 * context.services.chance()
            return Snoozed(pause, limits.RETRY_AFTER, f"rate limit: {error.message}", context.paid(), attempt=False)
        case Unavailable():
            return Snoozed(AWAY_PAUSE, RETRY, error.message, context.paid(), attempt=False)
        case BudgetExceeded():
            reporting.over_budget(context.run, context.step, error.message, waits=False)
        case StepError() if retry.again(context.node.retry, error, context.step.attempt):
            return _retry(context, error)
    return way_out(context, _final(context, error))


def _final(context: StepContext, error: GorgonError) -> dict[str, Any]:
    """Return the data of an error after which there are no more attempts."""
    found = context.error_data(error)
    if isinstance(error, StepError) and error.retryable and not found["hint"]:
        tries = "once" if context.step.attempt == 1 else f"{context.step.attempt} times"
        found["hint"] = f"The step was tried {tries}. Raise its `max_retries:`, or continue the run later."
    return found


def _wait(context: StepContext, seconds: float, reason: str, message: str, **fields: Any) -> Snoozed:
    """Park the step until the call has capacity.  The step gives up its slot; the wait does not count as an attempt."""
    left = context.seconds_left()
    seconds = seconds if left is None else max(0.0, min(seconds, left))
    return Snoozed(seconds, reason, message, context.paid(), attempt=False, **fields)


def _retry(context: StepContext, error: StepError) -> Outcome | OtherModel:
    if isinstance(error, Retryable):
        context.budget.try_again()
    seconds = retry.delay(context.node.retry, context.step.attempt, context.services.chance)
    left = context.seconds_left()
    if left is not None and seconds >= left:
        return way_out(context, context.error_data(error))
    took = (context.services.clock.now() - context.started_at).total_seconds()
    return Snoozed(seconds, RETRY, error.message, context.paid(), kind=error.kind, took=max(0.0, took))


def way_out(context: StepContext, error: dict[str, Any]) -> Outcome | OtherModel:
    """Apply `on_failure:` after the retries are exhausted."""
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
    """Fail the step for good, and the composite around it or the run where the plan requires that."""
    result = context.result(StepStatus.FAILED, error=error)
    alone = Done(result, context.run.descendants(context.step, failed=True))
    if context.step.parent is None:
        return alone if context.node.phase != "main" else Failed(result, context.run.gate, run_fails=True)
    number, _, _ = context.run.place(context.step.parent)
    around = context.run.plan.nodes[number]
    if kinds.handler(around.kind).stops_at_failure(around):
        return Failed(result, context.step.parent, run_fails=False)
    return alone
