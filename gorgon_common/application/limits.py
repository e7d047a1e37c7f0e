"""Rate limits: what the providers allow, how much of it is used, and the limits set by people."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from gorgon_common.bootstrap import TARGETS, Services, make_limiter
from gorgon_common.costs.tokens import TokenEstimator
from gorgon_common.errors import InputInvalid
from gorgon_common.operations.providers import MODEL_PROVIDERS
from gorgon_common.ratelimit.quotas import checked
from gorgon_common.scope import Scope


def show(services: Services, scope: Scope) -> dict[str, Any]:
    """Return `{gates, rules, estimates}`.

    These are the recent use of each model's rate limits, the limits set by people, and the accuracy of input token
    estimates.
    """
    limiter, _ = make_limiter(services.settings, services.database)
    try:
        gates = limiter.snapshot()
    finally:
        limiter.close()
    rules = [
        {"provider": provider, "model": model, "limits": limits}
        for provider, model, limits in services.limit_rules.all()
    ]
    estimates = [
        {"target": target, **seen}
        for target in TARGETS
        for seen in TokenEstimator(services.reports.ratios(target)).describe()
    ]
    return {"gates": gates, "rules": rules, "estimates": estimates}


def providers_like(pattern: str) -> list[str]:
    """Return the model providers that match a name or pattern.  Raises InputInvalid if there are none."""
    found = [name for name in MODEL_PROVIDERS if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern.lower(), MODEL_PROVIDERS, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"There are {', '.join(MODEL_PROVIDERS)}."
        raise InputInvalid(f"There is no model provider {pattern!r}.", hint=hint)
    return found


def change(
    services: Services, scope: Scope, provider: str, model: str, limits: Mapping[str, float], *, clear: bool = False
) -> dict[str, Any]:
    """Set limits for a provider's models (patterns); `clear`: first delete the limits that were set for them.

    Returns `{provider, model, limits, cleared}`: the limits now in place, and whether any were deleted.  Raises
    InputInvalid.
    """
    providers_like(provider)
    try:
        values = checked(provider, limits)
    except ValueError as error:
        raise InputInvalid(
            f"The limit cannot be set: {error}.",
            hint="Limits count per minute.  --clear takes away what was set for a model.",
        ) from None
    rules = services.limit_rules
    cleared = rules.clear(provider, model) if clear else False
    if values:
        rules.set(provider, model, values)
    kept = next((body for name, pattern, body in rules.all() if (name, pattern) == (provider, model)), {})
    return {"provider": provider, "model": model, "limits": kept, "cleared": cleared}
