"""The decisions of the limiter in Python: equivalent to `limiter.lua`, whose comments give the reasons.

The state is two plain dicts (the key's own and its account's; see `buckets`).  A store reads them, passes them in and
writes them back in one transaction: the database if there is no Redis, memory while Redis cannot be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common.ratelimit.admission import acquire, count_workers
from gorgon_common.ratelimit.buckets import Buckets, State
from gorgon_common.ratelimit.fairness import tidy
from gorgon_common.ratelimit.settling import LONG, settle


def decide(
    state: State, account: State, now: float, requests: Sequence[Mapping[str, Any]], *, scale: float = 1.0
) -> list[Any]:
    """Decide requests about one key at one moment, in their order; changes `state` and `account` in place.

    Returns one reply for each; `wire` describes both.  `now` is in milliseconds.  `scale`: the fraction of every limit
    that may be used here.
    """
    buckets = Buckets(state, account, now, scale)
    return [_OPERATIONS[request["operation"]](buckets, request) for request in requests]


def _extend(buckets: Buckets, request: Mapping[str, Any]) -> int:
    """Extend the leases that are still held; returns how many."""
    calls = buckets.state["calls"]
    held = [call for call in request["ids"] if call in calls]
    for call in held:
        calls[call]["ends"] = buckets.now + request["lease"]
    return len(held)


def _debit(buckets: Buckets, request: Mapping[str, Any]) -> int:
    """Deduct what was used without the limiter; all such deductions together are at most the capacity."""
    buckets.refresh()
    workers = max(1, count_workers(buckets))
    for name, bucket in buckets.limited():
        amount = request["used"].get(name, 0.0)
        most = amount if bucket["period"] > LONG else buckets.capacity(bucket) / workers
        buckets.put(bucket, buckets.level(bucket) - min(amount, most))
    return 1


def _drain(buckets: Buckets, _: Mapping[str, Any]) -> int:
    """Empty the buckets, except those that would take hours to refill."""
    for _name, bucket in buckets.limited():
        if bucket["period"] <= LONG:
            buckets.put(bucket, min(0.0, buckets.level(bucket)))
    return 1


def _snapshot(buckets: Buckets, _: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of the key for display; times in milliseconds from now."""
    tidy(buckets)
    state, now = buckets.state, buckets.now
    levels = {
        name: {
            "limit": bucket["limit"],
            "level": buckets.level(bucket),
            "told": buckets.told(bucket),
            "learned": "learned" in bucket,
            "set": bucket["ceiling"] == bucket["limit"],
            "period": bucket["period"],
        }
        for name, bucket in buckets.limited()
    }
    opens = state.get("breaker_until", 0.0)
    return {
        "levels": levels,
        "in_flight": len(state["calls"]),
        "waiting": len(state["due"]),
        "teams": {name: team["came"] - team["gone"] for name, team in state["teams"].items()},
        "workers": count_workers(buckets),
        "rate": state["fill"] * state["slowdown"],
        "closed": max(0.0, max(state.get("closed", 0.0), buckets.account.get("closed", 0.0)) - now),
        "breaker": max(0.0, opens - now),
        "half_open": 0 < opens <= now,
        "granted": state["granted"],
        "denied": state["denied"],
        "refused": state["refused"],
    }


_OPERATIONS = {
    "acquire": acquire,
    "settle": settle,
    "extend": _extend,
    "debit": _debit,
    "drain": _drain,
    "snapshot": _snapshot,
}
