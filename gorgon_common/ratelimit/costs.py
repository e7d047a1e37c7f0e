"""The cost of a call in each dimension: what is reserved, and what was used."""

from __future__ import annotations

from gorgon_common.costs.usage import Usage
from gorgon_common.engine.limits import Ask


def reserved(ask: Ask) -> dict[str, float]:
    """Return what is reserved for a call.

    `tokens` is the larger of the input and the maximum reply, as OpenAI admits calls.
    """
    return {
        "requests": 1.0,
        "requests_per_day": 1.0,
        "tokens": float(max(ask.tokens_in, ask.tokens_out)),
        "input_tokens": float(ask.tokens_in),
        "output_tokens": float(ask.tokens_out),
    }


def used(provider: str, usage: Usage) -> dict[str, float]:
    """Return what a call has used; Anthropic does not count cache reads."""
    counted = usage.input_tokens - (usage.cache_read_tokens if provider == "anthropic" else 0)
    return {
        "tokens": float(usage.input_tokens + usage.output_tokens),
        "input_tokens": float(max(0, counted)),
        "output_tokens": float(usage.output_tokens),
    }
