"""One step, from its claim to what becomes of it.

May it start?  → its kind does the work → where that fails, `failure` decides → an outcome, which the worker's loop
folds into the store in one transaction.
"""

from __future__ import annotations

from gorgon_common.engine import failure, join_rules, kinds, reporting
from gorgon_common.engine.failure import OtherModel
from gorgon_common.engine.kinds import StepContext, agent, composite
from gorgon_common.engine.kinds.base import StepServices
from gorgon_common.engine.outcomes import Outcome, Passed
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
        """Return what becomes of the step.  Never raises for what goes wrong in the step itself: failure is data."""
        context = StepContext(self.services, step)
        reporting.started(context.run, step)
        with logged(**reporting.names(context.run, step)):
            try:
                return _worked(context)
            except Exception as error:  # noqa: BLE001  whatever a step raises is judged there
                outcome = failure.outcome(context, _judged(context, error))
            return _on_other_model(context, outcome) if isinstance(outcome, OtherModel) else outcome


def _worked(context: StepContext) -> Outcome:
    """May it start?  If so, do it."""
    step = context.step
    if step.crashes >= context.services.poison_deaths:
        raise Poison(
            f"Its worker died {step.crashes} times while the step ran; it is not tried again.",
            hint="See what it does to the worker (memory, signals); `gorgon runs resume` tries it again.",
        )
    if step.weight == Weight.FAST:  # only steps without joins and conditions are
        return kinds.handler(context.node.kind).execute(context)
    blocked = join_rules.blocked(context.run, step)
    if blocked is not None:
        return context.skipped(blocked)
    fallback = context.fallback()
    if fallback is not None:
        return composite.fallback_ended(context, fallback)
    if step.weight == Weight.INLINE and context.node.queue is not None:
        return Passed()
    return kinds.handler(context.node.kind).execute(context)


def _judged(context: StepContext, error: Exception) -> GorgonError:
    """Return the error that decides what becomes of the step.  Raises it where that is not for the step to decide."""
    if isinstance(error, failure.HANDLED) or (isinstance(error, Unavailable) and context.calls):
        return error
    if isinstance(error, GorgonError) or context.node.kind == "end":
        raise error  # the database is away and nothing was paid yet; or the run could not end any more
    log.exception("a step failed in a way that nobody expected", step=context.step.id)
    return Internal.of(error)


def _on_other_model(context: StepContext, other: OtherModel) -> Outcome:
    """Make the one more attempt that `fallback: {type: model}` gives."""
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
