"""Executes one claimed step and returns its outcome.

Check that the step may start, let the handler of its kind do the work, and let `failure` decide if that raises.  The
worker loop commits the outcome in one transaction.
"""

from __future__ import annotations

from gorgon_common.engine import failure, join_rules, kinds, reporting
from gorgon_common.engine.failure import OtherModel
from gorgon_common.engine.kinds import StepContext, agent, composite
from gorgon_common.engine.kinds.base import StepServices
from gorgon_common.engine.outcomes import ConditionMet, Outcome
from gorgon_common.engine.records import Claimed, Weight
from gorgon_common.errors import GorgonError, Internal, StepError, Unavailable
from gorgon_common.logs import context as logged
from gorgon_common.logs import get_logger

log = get_logger(__name__)


class Poison(StepError):
    """The step kills the workers that run it."""

    kind = "poison"


class Executor:
    """Executes claimed steps; thread-safe."""

    def __init__(self, services: StepServices) -> None:
        self.services = services

    def execute(self, step: Claimed) -> Outcome:
        """Return the outcome of the step.  Does not raise for a failure of the step itself: that is an outcome too."""
        context = StepContext(self.services, step)
        reporting.started(context.run, step)
        with logged(**reporting.names(context.run, step)):
            try:
                return _worked(context)
            except Exception as error:  # noqa: BLE001  `failure` decides what any exception of a step means
                outcome = failure.outcome(context, _judged(context, error))
            return _on_other_model(context, outcome) if isinstance(outcome, OtherModel) else outcome


def _worked(context: StepContext) -> Outcome:
    """Run the step if it may start."""
    step = context.step
    if step.crashes >= context.services.poison_deaths:
        raise Poison(
            f"Its worker died {step.crashes} times while the step ran; it is not tried again.",
            hint="See what it does to the worker (memory, signals); `gorgon runs resume` tries it again.",
        )
    blocked = join_rules.blocked(context.run, step)
    if blocked is not None:
        return context.skipped(blocked)
    fallback = context.fallback()
    if fallback is not None:
        return composite.fallback_ended(context, fallback)
    if step.weight == Weight.INLINE and context.node.queue is not None:
        return ConditionMet()
    return kinds.handler(context.node.kind).execute(context)


def _judged(context: StepContext, error: Exception) -> GorgonError:
    """Return the error that decides the step's outcome.  Re-raises errors that are not the step's own."""
    if isinstance(error, failure.HANDLED) or (isinstance(error, Unavailable) and context.calls):
        return error
    if isinstance(error, GorgonError) or context.node.kind == "end":
        raise error  # the database is unavailable and nothing has been paid for yet, or the run could not be closed
    log.exception("a step failed in a way that nobody expected", step=context.step.id)
    return Internal.of(error)


def _on_other_model(context: StepContext, other: OtherModel) -> Outcome:
    """Make the one extra attempt that `fallback: {type: model}` allows."""
    error: GorgonError
    try:
        return agent.ask(context, other.model, {"fallback": other.error["message"]})
    except StepError as failed:
        return failure.fatal(context, context.error_data(failed))
    except failure.HANDLED as waits:
        error = waits
    outcome = failure.outcome(context, error)
    assert not isinstance(outcome, OtherModel)
    return outcome
