"""One step, from its claim to what becomes of it.

May it start?  → its kind does the work → where that fails, `failure` decides → an outcome, which the worker's loop
folds into the store in one transaction.
"""

from __future__ import annotations

from gorgon_common.engine import failure, join_rules, kinds
from gorgon_common.engine.failure import OtherModel
from gorgon_common.engine.kinds import StepContext, agent, composite
from gorgon_common.engine.kinds.base import StepServices
from gorgon_common.engine.outcomes import Outcome, Passed
from gorgon_common.engine.records import Claimed, Weight
from gorgon_common.errors import GorgonError, StepError

POISON_CRASHES = 3


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
        try:
            return _worked(context)
        except failure.HANDLED as error:
            outcome = failure.outcome(context, error)
        return _on_other_model(context, outcome) if isinstance(outcome, OtherModel) else outcome


def _worked(context: StepContext) -> Outcome:
    """May it start?  If so, do it."""
    step = context.step
    if step.crashes >= POISON_CRASHES:
        raise Poison(f"Its worker died {step.crashes} times while it ran; it will not be tried again.")
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
