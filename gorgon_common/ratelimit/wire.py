"""Requests to the limiter and its replies as plain data, which `limiter.lua` and `decisions` both understand.

Times are in milliseconds.  A request is

    {operation: acquire, id, ticket, team, weight, lease, worker, seats,
     dimensions: [{name, period, whole, cost, assumed?, ceiling?, labelled?}]}
    {operation: settle, id, outcome, after?, used: {dimension: amount},
     signals: {dimension: {limit?, remaining?, resets?, absolute}}}
    {operation: extend, ids, lease}   {operation: debit, used}   {operation: drain}   {operation: snapshot}

and the reply to `acquire` {kind: grant, now, workers, limits}, {kind: wait, wait, why, due} or {kind: never, dimension,
cost, limit}; to others a number; to `snapshot` the state for display.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common.engine.limits import Answer, Ask, Grant, LimitKey, Never, Quota, Settlement, Wait
from gorgon_common.operations.dimensions import Dimension
from gorgon_common.ratelimit.costs import reserved

Request = dict[str, Any]


def acquire(
    ask: Ask,
    dimensions: Sequence[Dimension],
    quotas: tuple[Quota, Quota],
    *,
    worker: str,
    lease: float,
    scale: float = 1.0,
) -> Request:
    """Return the request to admit a call.  `quotas`: assumed and set limits.  `lease` is in seconds."""
    assumed, ceiling = quotas
    cost = reserved(ask, dimensions)
    return {
        "operation": "acquire",
        "id": ask.id,
        "ticket": ask.ticket or ask.id,
        "team": ask.team,
        "weight": ask.weight,
        "lease": lease * 1000,
        "worker": worker,
        "seats": max(1, int(min(assumed.concurrency, ceiling.concurrency) * scale)),
        "dimensions": [
            _dimension(dimension, cost[dimension.name], ask, assumed, ceiling)
            for dimension in dimensions
            if dimension.name in cost
        ],
    }


def _dimension(dimension: Dimension, cost: float, ask: Ask, assumed: Quota, ceiling: Quota) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": dimension.name,
        "period": dimension.period * 1000,
        "whole": dimension.whole,
        "cost": cost,
    }
    if dimension.per:
        entry["name"], entry["labelled"] = f"{dimension.name}/{ask.labels[dimension.per]}", True
    for key, quota in (("assumed", assumed), ("ceiling", ceiling)):
        if dimension.name in quota.limits:
            entry[key] = quota.limits[dimension.name]
    return entry


def settle(grant: Grant, settlement: Settlement) -> Request:
    """Return the request to settle a call."""
    signals = {
        name: {
            **_known(
                limit=signal.limit,
                remaining=signal.remaining,
                resets=None if signal.resets is None else signal.resets * 1000,
            ),
            "absolute": signal.absolute,
        }
        for name, signal in settlement.signals.items()
    }
    after = settlement.retry_after
    return {
        "operation": "settle",
        "id": grant.id,
        "outcome": settlement.outcome,
        "used": dict(settlement.used),
        "signals": signals,
        **_known(after=None if after is None else after * 1000),
    }


def _known(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}


def answer(ask: Ask, reply: Mapping[str, Any], *, local: bool) -> Answer:
    """Return the answer in a reply to `acquire`."""
    match reply["kind"]:
        case "grant":
            return Grant(ask.id, ask.gate, reply["now"] / 1000, local=local)
        case "wait":
            return Wait(reply["wait"] / 1000, _declared(reply["why"]), reply["due"] / 1000)
    dimension, cost, limit = _declared(reply["dimension"]), float(reply["cost"]), float(reply["limit"])
    what = dimension.replace("_", " ")
    return Never(f"it needs {cost:,.0f} {what}, but the limit is {limit:,.0f}", dimension, cost, limit)


def _declared(name: str) -> str:
    """Return the dimension of a bucket, without the label."""
    return name.partition("/")[0]


def shown(gate: LimitKey, state: Mapping[str, Any], dimensions: Sequence[Dimension]) -> dict[str, Any]:
    """Return the state of a key for display: times in seconds, the dimensions as they are declared."""
    order = {dimension.name: number for number, dimension in enumerate(dimensions)}
    levels = sorted(state["levels"].items(), key=lambda entry: (order.get(_declared(entry[0]), 99), entry[0]))
    return {
        "target": gate.target,
        "provider": gate.provider,
        "account": gate.account,
        "model": gate.model,
        **state,
        "levels": {name: {"told": None, **level, "period": level["period"] / 1000} for name, level in levels},
        "closed": round(state["closed"] / 1000, 3),
        "breaker": round(state["breaker"] / 1000, 3),
    }
