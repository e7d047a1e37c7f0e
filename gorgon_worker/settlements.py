"""Translates how a call ended into what the limiter is told."""

from __future__ import annotations

from gorgon_common.costs.usage import Usage
from gorgon_common.engine import limits
from gorgon_common.engine.limits import Settlement
from gorgon_common.engine.ports import AgentReply
from gorgon_common.errors import ProviderError, RateLimited, Retryable
from gorgon_common.ratelimit.costs import used
from gorgon_common.ratelimit.headers import signals
from gorgon_worker.providers.failures import retry_after


def settlement(provider: str, ending: AgentReply | BaseException) -> Settlement:
    """Return the settlement of a call: of its reply, or of the error that it failed with."""
    if isinstance(ending, AgentReply):
        return Settlement(limits.OK, _used(provider, ending.usage), signals(provider, ending.headers))
    if isinstance(ending, ProviderError):
        return after_error(provider, ending)
    return Settlement(limits.NEUTRAL)


def after_error(provider: str, error: ProviderError) -> Settlement:
    """Return the settlement of a failed call for the limiter."""
    outcome = limits.NEUTRAL
    wait: float | None = None
    if isinstance(error, RateLimited):
        outcome, wait = limits.RATE_LIMITED, error.retry_after
    elif isinstance(error, Retryable):
        overloaded = error.kind == "overloaded"
        outcome = limits.OVERLOADED if overloaded else limits.FAILED
        wait = retry_after(error.headers) if overloaded else None
    return Settlement(outcome, _used(provider, error.usage), signals(provider, error.headers), wait)


def _used(provider: str, usage: Usage | None) -> dict[str, float]:
    """Return a call's usage per dimension; if it is unknown, the reserved amount stays charged."""
    return {} if usage is None else used(provider, usage)
