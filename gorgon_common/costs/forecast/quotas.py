"""How long the provider's quotas delay the work, and which quota is the binding one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common.costs.forecast.work import Quota, Sums, Work

BURST_SECONDS = 3.0
"""What a bucket holds when the work begins, in seconds of its rate (the limiter's burst)."""


def _needs(quota: Quota, calls: float, tokens_in: float, tokens_out: float) -> dict[str, float]:
    """Return dimension → seconds in which the quota admits this much."""
    wanted = (
        ("requests", quota.requests, calls),
        ("input_tokens", quota.input_tokens, tokens_in),
        ("output_tokens", quota.output_tokens, tokens_out),
        ("tokens", quota.tokens, tokens_in + tokens_out),
    )
    return {name: 60.0 * amount / limit for name, limit, amount in wanted if limit}


def _quota_of(work: Work, provider: str, model: str) -> Quota | None:
    return work.quotas.get((provider, model)) or work.quotas.get((provider, "*"))


def quota_seconds(work: Work, models: Mapping[tuple[str, str], Sums]) -> float:
    """Return the seconds that the work takes if only the quotas limit it."""
    longest = 0.0
    for (provider, model), sums in models.items():
        quota = _quota_of(work, provider, model)
        if quota is not None:
            needs = _needs(quota, sums.calls, sums.input, sums.output)
            longest = max(longest, max(needs.values(), default=0.0) - BURST_SECONDS)
    return longest


def binding_quota(
    work: Work, models: Mapping[tuple[str, str], Mapping[str, float]], seconds: float
) -> dict[str, Any] | None:
    """Return the quota that the work uses most, None where no quotas are known.

    `{provider, model, dimension, per_minute, needed, seconds, share, binds}`: `share` is the used fraction of the quota
    over the work's duration; `binds` is true where the quota delays the work.
    """
    found: list[dict[str, Any]] = []
    for (provider, model), used in models.items():
        quota = _quota_of(work, provider, model)
        if quota is None:
            continue
        for name, needed in _needs(quota, used["calls"], used["input"], used["output"]).items():
            limit = getattr(quota, name)
            found.append(
                {
                    "provider": provider,
                    "model": model,
                    "dimension": name,
                    "per_minute": limit,
                    "needed": round(needed / 60.0 * limit),
                    "seconds": round(needed, 1),
                    "share": round(needed / max(60.0, seconds), 4),
                    "binds": needed - BURST_SECONDS > 0 and needed - BURST_SECONDS >= seconds * 0.99,
                }
            )
    return max(found, key=lambda entry: float(entry["share"]), default=None)
