"""Answers that both limiters share."""

from __future__ import annotations

from typing import Any

from gorgon_common.engine.limits import LimitKey, Never


def never(dimension: str, cost: float, limit: float) -> Never:
    """Return the answer to a call that is larger than the whole limit."""
    what = dimension.replace("_", " ")
    return Never(f"it needs {cost:,.0f} {what}, but the limit is {limit:,.0f}", dimension, cost, limit)


def shown(gate: LimitKey, state: dict[str, Any]) -> dict[str, Any]:
    """Return the state of a gate for display: times in seconds."""
    levels = dict(state["levels"]) or {}
    return {
        "target": gate.target,
        "provider": gate.provider,
        "account": gate.account,
        "model": gate.model,
        **state,
        "levels": levels,
        "closed": round(state["closed"] / 1000, 3),
        "breaker": round(state["breaker"] / 1000, 3),
    }
