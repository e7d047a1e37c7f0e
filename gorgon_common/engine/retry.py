"""Retry policy: whether and when a failed attempt is repeated."""

from __future__ import annotations

from collections.abc import Callable

from gorgon_common.errors import StepError
from gorgon_common.workflow.plan import Retry


def delay(policy: Retry, attempt: int, random: Callable[[], float]) -> float:
    """Return the seconds before attempt `attempt + 1`.

    Full jitter: uniform between 0 and the exponential bound (Brooker, "Exponential Backoff And Jitter", 2015).
    """
    bound = policy.initial if policy.backoff == "fixed" else policy.initial * 2.0 ** (attempt - 1)
    bound = min(bound, policy.cap)
    return bound * random() if policy.jitter == "full" else bound


def again(policy: Retry, error: StepError, attempt: int) -> bool:
    """Tell whether another attempt may follow `error` at attempt `attempt` (from 1)."""
    return error.retryable and attempt <= policy.max and _class(error.kind) in policy.on


def _class(kind: str) -> str:
    """Return the `retry: {on: […]}` name for a kind of error."""
    return {"overloaded": "server", "command": "exit_code"}.get(kind, kind)
