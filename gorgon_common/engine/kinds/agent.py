"""`prompt:` — one conversation with a model, from the call to the step's output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from gorgon_common.costs.usage import Usage
from gorgon_common.engine import limits, rendering
from gorgon_common.engine.agent import Earlier, converse
from gorgon_common.engine.calls.chain import CallChain
from gorgon_common.engine.calls.record import Recorder
from gorgon_common.engine.kinds.base import StepContext, StepHandler
from gorgon_common.engine.outcomes import Outcome
from gorgon_common.engine.ports import AgentCall, AgentProvider
from gorgon_common.errors import ConfigurationError, Final, RateLimited, StepError, Throttled
from gorgon_common.operations.providers import DAILY
from gorgon_common.roles.models import resolve_model
from gorgon_common.workflow.expressions import conform

DEFAULT_TIER = "standard"
LONG_WAIT = 60.0
"""Seconds.  A provider that is unavailable for longer is skipped in favour of the next model in `models:`."""


class Agent(StepHandler):
    """Tries the step's models in order until one of them serves the call."""

    kind: ClassVar[str] = "agent"

    def execute(self, context: StepContext) -> Outcome:
        """Return the reply.  Raises the shortest wait if waiting can help, otherwise the last model's error."""
        spec = context.node.spec
        models = spec.get("models") or [f"{spec['provider']}:{spec.get('model') or ''}"]
        failure: StepError | None = None
        waits: list[tuple[float, Throttled | RateLimited]] = []
        for model in models:
            try:
                return ask(context, model)
            except (Throttled, RateLimited) as busy:
                seconds = _out_of_service(busy)
                if seconds is None:
                    raise
                waits.append((seconds, busy))
            except (StepError, ConfigurationError) as error:
                failure = error if isinstance(error, StepError) else Final(error.message, hint=error.hint)
        if waits:
            shortest, first = min(waits, key=lambda wait: wait[0])
            if failure is None or not failure.retryable or shortest <= LONG_WAIT:
                raise first
        assert failure is not None
        raise failure


def ask(context: StepContext, model: str, detail: Mapping[str, Any] | None = None) -> Outcome:
    """Call the model `provider:model`; `detail` is merged into the result's.  Raises what the call raises."""
    provider, _, name = model.partition(":")
    call = _call(context, provider, name)
    fingerprint = context.fingerprint(
        provider, call.model, call.system, call.messages[0].content, call.schema, call.max_tokens, call.effort
    )
    adopted = context.adopted(fingerprint)
    if adopted is not None:
        return adopted
    found = _provider(context, provider)
    context.budget.record(context.calls)
    # An earlier model may hold reservations for calls that were never made; their ordinals must not be reused.
    before = max([0, *context.budget.held, *(made.ordinal for made in context.calls)])
    if not context.calls:
        context.started_at = context.services.clock.now()  # importing the SDK does not count towards the attempt
    chain = CallChain(
        found,
        Recorder(context.services.pricer, context.services.clock, context.record),
        name=provider,
        cancelled=context.cancelled,
        money=context.budget,
        limits=context.services.limits,
        before=before,
        clock=context.services.clock,
    )
    reply = converse(chain, call, memory=_Memory(context, fingerprint))
    # A `number` field stays a decimal even if the model wrote 3, because expressions divide by the schema's type.
    output = conform(reply.data, call.schema) if call.schema is not None else reply.text
    known = {"provider": provider, "model": reply.model, "role": call.role, "fingerprint": fingerprint}
    return context.succeeded(output, {**known, **(detail or {})})


@dataclass(frozen=True, slots=True)
class _Memory:
    """Stores a conversation with the step's budgets, which know what it has cost."""

    context: StepContext
    fingerprint: str

    def earlier(self) -> Earlier | None:
        """Return where to resume."""
        return self.context.budget.earlier(self.fingerprint)

    def keep(self, state: Earlier) -> bool:
        """Store the conversation."""
        return self.context.budget.keep(self.fingerprint, state, self.context.calls)


def _call(context: StepContext, provider: str, model: str) -> AgentCall:
    spec = context.node.spec
    return rendering.agent_call(
        spec,
        context.env(),
        model=resolve_model(provider, model or spec.get("tier") or DEFAULT_TIER),
        timeout=context.timeout(),
        label=context.run.path(context.step),
        team=context.run.info.team,
        ticket=str(context.step.id),
        patient=any(not call.measured or call.usage != Usage() for call in context.calls),
    )


def _provider(context: StepContext, name: str) -> AgentProvider:
    found = context.services.providers.get(name)
    if found is None:
        raise Final(
            f"There is no provider {name!r}; there are {', '.join(sorted(context.services.providers))}.",
            hint="Set `provider:` of the step.",
        )
    return found


def _out_of_service(busy: Throttled | RateLimited) -> float | None:
    """Return how many seconds a model stays unavailable, or None if the step should wait for its turn instead.

    A long queue is no reason to switch models: the next one may cost more, and a large map would move to it as a whole.
    """
    if isinstance(busy, RateLimited):
        seconds = busy.retry_after or 0.0
        return seconds if seconds > LONG_WAIT else None
    if busy.reason == limits.BREAKER:
        return busy.seconds
    exhausted = busy.reason in (limits.RETRY_AFTER, *DAILY)
    return busy.seconds if exhausted and busy.seconds > LONG_WAIT else None
