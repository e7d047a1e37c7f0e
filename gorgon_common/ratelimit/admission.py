"""Admits a call, or says when it may come back: `acquire` of `limiter.lua` in Python."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gorgon_common.ratelimit.breaker import opened
from gorgon_common.ratelimit.buckets import BURST, Buckets
from gorgon_common.ratelimit.fairness import Position, leave, line_up, position, robs, served, tidy

VALVE, RECOVERY = 0.8, 0.2
SEEN, PATIENT = 60_000.0, 10_000.0
BREAKER_PROBE = 60_000.0


@dataclass(slots=True)
class _Room:
    """Whether there is room for a call.

    `room`: enough; `idle`: so much that no turn is required; `turn`: whether it is this call's turn.  `base`: when the
    key is available again, and `soonest`: when there is room (milliseconds from now).  `why`: what is missing.
    """

    room: bool
    idle: bool
    turn: bool
    base: float
    soonest: float
    why: str | None

    def blocked(self, wait: float, why: str) -> None:
        """Note that nothing is admitted for so long."""
        if wait > self.base:
            self.base, self.why = wait, why


def acquire(buckets: Buckets, request: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reply to one request; see `wire`."""
    state, asked = buckets.state, request["dimensions"]
    _configure(buckets, asked)
    state["workers"][request["worker"]] = buckets.now
    workers = count_workers(buckets)
    if request["id"] in state["calls"]:
        return _granted(buckets, workers)
    cost, share = {entry["name"]: entry["cost"] for entry in asked}, 0.0
    for name, amount in cost.items():
        bucket = buckets.dimensions[name]
        limit = bucket.get("limit")
        if limit is None:
            continue
        if amount > limit / buckets.scale:
            return {"kind": "never", "dimension": name, "cost": amount, "limit": limit / buckets.scale}
        if not bucket["labelled"]:
            share = max(share, amount * bucket["period"] / limit / 1000)
    tidy(buckets)
    base, why, probing = opened(buckets)
    member, weight = f"{request['team']}\n{request['ticket']}", request["weight"]
    at = position(buckets, request["team"], weight, member)
    found = _room(buckets, cost, request["seats"], at, _Room(base == 0, True, at.turn, base, base, why))
    if robs(buckets, at.elder, cost) or robs(buckets, at.rival, cost):
        found.idle = found.turn = False
    if not found.room or not (found.turn or found.idle):
        soft = max(found.soonest - found.base, max(5.0, 1000 * state.get("mean_share", 0.0)) if found.room else 0.0)
        if soft > PATIENT:
            soft = PATIENT + 0.6 * (soft - PATIENT)
        wait = max(5.0, found.base + soft)
        line_up(buckets, at, request["team"], weight, member, cost, wait)
        return {"kind": "wait", "wait": wait, "why": found.why or "turn", "due": buckets.now + wait}
    _take(buckets, request, share, cost)
    served(buckets, at, request["team"], share / weight)
    if at.place is not None:
        leave(buckets, member)
    slowdown = state["slowdown"]
    if slowdown < 1:
        state["slowdown"] = min(1.0, slowdown + RECOVERY * max(share, 1 / request["seats"]) / slowdown)
    if probing:
        state["probe_until"], state["probe"] = buckets.now + BREAKER_PROBE, request["id"]
    return _granted(buckets, workers)


def count_workers(buckets: Buckets) -> int:
    """Return how many workers have asked recently; forgets the others."""
    workers = buckets.state["workers"]
    for name in [name for name, seen in workers.items() if seen <= buckets.now - SEEN]:
        del workers[name]
    return len(workers)


def _granted(buckets: Buckets, workers: int) -> dict[str, Any]:
    limits = {name: bucket["limit"] for name, bucket in buckets.limited() if not bucket["labelled"]}
    return {"kind": "grant", "workers": workers, "now": buckets.now, "limits": limits}


def _configure(buckets: Buckets, asked: Sequence[Mapping[str, Any]]) -> None:
    """Apply the declared dimensions, and the configured and the learned limits."""
    for entry in asked:
        bucket = buckets.dimensions.get(entry["name"])
        if bucket is None or buckets.is_idle(bucket):
            bucket = buckets.dimensions[entry["name"]] = {}
        ceiling = entry.get("ceiling")
        bucket.update(
            period=entry["period"], whole=entry["whole"], labelled=entry.get("labelled", False), ceiling=ceiling
        )
        bound = bucket.get("learned", entry.get("assumed"))
        if ceiling is not None and (bound is None or ceiling < bound):
            bound = ceiling
        bound = None if bound is None else bound * buckets.scale
        if bound != bucket.get("limit"):
            before = buckets.level(bucket) if bucket.get("limit") is not None else None
            bucket["limit"] = bound
            if before is not None and bound is not None:
                buckets.put(bucket, min(before, buckets.capacity(bucket)))
        if bound is not None and "level" not in bucket:
            buckets.put(bucket, buckets.level(bucket))


def _room(buckets: Buckets, cost: Mapping[str, float], seats: int, at: Position, found: _Room) -> _Room:
    """Complete what is known about the room for a call."""
    wanted = [(name, buckets.dimensions[name], amount) for name, amount in cost.items() if amount > 0]
    wanted = [entry for entry in wanted if entry[1].get("limit") is not None]
    for name, bucket, amount in wanted:
        left = buckets.told(bucket)
        if left is not None and left < amount:
            found.room = False
            window = bucket.get("window")
            refill = (amount - left) * bucket["period"] / bucket["limit"]
            found.blocked(bucket["left_until"] - buckets.now if window else refill, name)
    found.soonest = found.base
    for name, bucket, amount in wanted:
        _look(buckets, name, bucket, amount, at, found)
    taken, allowed = len(buckets.state["calls"]), max(1, math.floor(seats * buckets.state["slowdown"]))
    if taken >= allowed:
        found.room, found.why = False, found.why or "concurrency"
        mean = buckets.state.get("latency", 1000.0)
        found.soonest = max(found.soonest, found.base + (at.before + 1) * mean / allowed)
    elif allowed - taken < 1 + max(1.0, VALVE * BURST * allowed):
        found.idle = False
        found.turn = found.turn and allowed - taken > at.ahead
    return found


def _look(buckets: Buckets, name: str, bucket: Mapping[str, Any], amount: float, at: Position, found: _Room) -> None:
    """Look for room in one bucket."""
    bucket = buckets.dimensions[name]
    has, cap, mean = buckets.level(bucket), buckets.capacity(bucket), bucket.get("mean", amount)
    need, rate, labelled = buckets.starts(bucket, amount), buckets.rate(bucket), bucket["labelled"]
    first = at.elder["cost"].get(name) if at.elder is not None else None
    more = max(0.0, buckets.starts(bucket, first) - mean) if first is not None else 0.0
    if has < need:
        found.room = False
    if not labelled and has < max(need, cap * VALVE):
        found.idle = False
        found.turn = found.turn and has >= need + at.ahead * mean + more
    missing = need + at.before * mean + more - min(cap, has + found.base * rate)
    if (has < need or not labelled) and found.base + missing / rate > found.soonest:
        found.soonest = found.base + missing / rate
        if has < need or found.why is None:
            found.why = name


def _take(buckets: Buckets, request: Mapping[str, Any], share: float, cost: Mapping[str, float]) -> None:
    """Take what a call needs and note the call."""
    state, reserved, before = buckets.state, {}, {}
    for name, amount in cost.items():
        bucket = buckets.dimensions[name]
        if bucket.get("limit") is None:
            continue
        left = buckets.told(bucket)
        if left is not None:
            bucket["left"], bucket["left_at"] = left - amount, buckets.now
        buckets.put(bucket, buckets.level(bucket) - amount)
        bucket["spent"] = bucket.get("spent", 0.0) + amount
        bucket.setdefault("mean", amount)
        reserved[name], before[name] = amount, bucket["spent"]
    state["mean_share"] = 0.9 * state.get("mean_share", share) + 0.1 * share
    state["granted"] += 1
    state["calls"][request["id"]] = {
        "ends": buckets.now + request["lease"],
        "team": request["team"],
        "weight": request["weight"],
        "at": buckets.now,
        "number": state["granted"],
        "share": share,
        "lease": request["lease"],
        "reserved": reserved,
        "before": before,
    }
