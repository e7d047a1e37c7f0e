"""Settles a call and learns from its reply: `settle` of `limiter.lua` in Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gorgon_common.ratelimit.breaker import judge
from gorgon_common.ratelimit.buckets import FIRST, FULL, Bucket, Buckets

RAISE, DECREASE, FLOOR, EPOCH = 0.01, 0.5, 0.05, 1000.0
CLOSE, STILL, WATCH = 1000.0, 250.0, 1500.0
LONG = 3_600_000.0


def settle(buckets: Buckets, request: Mapping[str, Any]) -> int:
    """Settle a reservation, and learn from the reply; see `wire`.  Returns 1, or 0 if the call is not in flight."""
    state = buckets.state
    call = state["calls"].pop(request["id"], None)
    if call is None:
        return 0
    took = buckets.now - call["at"]
    state["latency"] = 0.9 * state.get("latency", took) + 0.1 * took
    _correct(buckets, call, _refund(buckets, call, request["used"]))
    agree: bool | None = None
    for name, signal in request["signals"].items():
        said = _learn(buckets, name, signal, call) if name in buckets.dimensions else None
        if said is not None:
            agree = said if agree is None else agree and said
    if request["outcome"] in ("rate_limited", "overloaded"):
        _slow(buckets, request, call)
    elif request["outcome"] == "ok":
        state["refusals"] = 0
        if agree:
            if state["fill"] < FULL:
                buckets.refresh()
                passed = min(1000.0, max(0.0, buckets.now - state.get("agreed_at", buckets.now)))
                state["fill"] = min(FULL, state["fill"] + RAISE * passed / 1000)
            state["agreed_at"] = buckets.now
    judge(buckets, request["id"], request["outcome"])
    return 1


def _refund(buckets: Buckets, call: Mapping[str, Any], used: Mapping[str, float]) -> float:
    """Give back what was not used, and take what was used beyond; returns the real share."""
    real = 0.0
    for name, reserved in call["reserved"].items():
        bucket = buckets.dimensions.get(name)
        if bucket is None or bucket.get("limit") is None:
            continue
        actual = used.get(name, reserved)
        if not bucket["labelled"]:
            real = max(real, actual * bucket["period"] / bucket["limit"] / 1000)
        bucket["mean"] = 0.9 * bucket.get("mean", actual) + 0.1 * actual
        back = reserved - actual
        if not back:
            continue
        has = buckets.level(bucket)
        most = max(buckets.capacity(bucket), 2 * reserved)
        buckets.put(bucket, max(has, min(most, has + back)) if back > 0 else has + back)
        if "left" in bucket and call["number"] > bucket.get("left_by", 0):
            bucket["left"] += back
    return real


def _correct(buckets: Buckets, call: Mapping[str, Any], real: float) -> None:
    """Correct the team's tags by the real share of the call."""
    name, change = call["team"], (real - call["share"]) / call["weight"]
    if name in buckets.state["finish"]:
        buckets.state["finish"][name] += change
        if name in buckets.state["teams"]:
            buckets.state["teams"][name]["tag"] += change


def _learn(buckets: Buckets, name: str, signal: Mapping[str, Any], call: Mapping[str, Any]) -> bool | None:
    """Apply one header; returns whether it confirms that capacity is left, None without information."""
    bucket, now = buckets.dimensions[name], buckets.now
    capped, left = signal.get("limit"), signal.get("remaining")
    if capped is not None and capped != bucket.get("learned"):
        buckets.refresh()
        bucket["learned"] = capped
        has = buckets.level(bucket) if bucket.get("limit") is not None else None
        ceiling = bucket["ceiling"]
        bucket["limit"] = (capped if ceiling is None else min(capped, ceiling)) * buckets.scale
        if has is not None:
            buckets.put(bucket, min(has, buckets.capacity(bucket)))
    if left is None or bucket.get("limit") is None:
        return None
    ends = None
    if signal.get("resets") is not None:
        ends = _reset(buckets, bucket, (now if signal["absolute"] else call["at"]) + signal["resets"])
        if ends is None:
            return None
    if call["number"] < bucket.get("left_by", 0):
        return None
    rest = left - (bucket.get("spent", 0.0) - call["before"].get(name, 0.0))
    window = ends if bucket.get("window") else None
    if window is not None:
        starts = [other["at"] for other in buckets.state["calls"].values()]
        close = sum(call["at"] - CLOSE <= start < call["at"] for start in starts)
        rest -= close * bucket.get("mean", 0.0)
    else:
        rest += max(0.0, now - call["at"]) * bucket["limit"] / bucket["period"]
    bucket.update(left=rest, left_at=now, left_by=call["number"])
    bucket["left_until"] = window + 5 if window is not None else now + 60_000
    return bool(rest >= bucket.get("mean", 0.0))


def _reset(buckets: Buckets, bucket: Bucket, ends: float) -> float | None:
    """Return when the provider's window resets, None where that has passed; tells windows from buckets."""
    now = buckets.now
    if ends <= now:
        return None
    known, first = bucket.get("resets"), bucket.get("reset_first", 0.0)
    if known is not None and now < known and abs(ends - first) <= STILL:
        bucket["resets"] = max(ends, known)
        if now - bucket["reset_since"] >= WATCH:
            bucket["window"] = True
    else:
        if known is not None and now < known - 2 * STILL and ends > first + STILL:
            bucket.pop("window", None)
        bucket["resets"] = bucket["reset_first"] = ends
        bucket["reset_since"] = now
    return float(bucket["resets"])


def _slow(buckets: Buckets, request: Mapping[str, Any], call: Mapping[str, Any]) -> None:
    """Slow down after a refused call, and pause for as long as the provider asked."""
    state, after = buckets.state, request.get("after")
    buckets.refresh()
    if buckets.now - state.get("slowed_at", 0.0) >= EPOCH:
        state["slowdown"] = max(FLOOR, state["slowdown"] * DECREASE)
        state["slowed_at"], state["fill"] = buckets.now, FIRST
    state["refusals"] += 1
    if request["outcome"] == "rate_limited":
        state["refused"] += 1
        for name, bucket in buckets.limited():
            if bucket["period"] <= LONG and (not bucket["labelled"] or name in call["reserved"]):
                buckets.put(bucket, min(0.0, buckets.level(bucket)))
        if after is None:
            after = min(30_000.0, 500.0 * 2 ** min(state["refusals"], 10))
    if after is not None:
        where = state if request["signals"] else buckets.account
        where["closed"] = max(where.get("closed", 0.0), buckets.now + after)
