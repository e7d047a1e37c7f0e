"""The circuit breaker of a key, and the pauses that a provider asks for: parts of `limiter.lua` in Python."""

from __future__ import annotations

import math

from gorgon_common.ratelimit.buckets import Buckets

WINDOW, CALLS, SHARE = 10, 20, 0.5
FIRST_PAUSE, LONGEST_PAUSE = 5000.0, 120_000.0


def opened(buckets: Buckets) -> tuple[float, str | None, bool]:
    """Return (milliseconds until available, why it is blocked, whether the next call is the breaker's probe)."""
    state, now = buckets.state, buckets.now
    base, why = 0.0, None
    shut = max(state.get("closed", 0.0), buckets.account.get("closed", 0.0)) - now
    if shut > base:
        base, why = shut, "retry_after"
    opens = state.get("breaker_until", 0.0)
    probing = 0 < opens <= now and state.get("probe_until", 0.0) <= now
    left = opens - now
    if 0 < opens <= now:  # half open: a probe runs, or may run
        left = min(state.get("probe_until", 0.0) - now, 1000.0)
    if left > base:
        base, why = left, "breaker"
    return base, why, probing


def judge(buckets: Buckets, call: str, outcome: str) -> None:
    """Learn from the outcome of a call whether the breaker opens or closes."""
    state = buckets.state
    good, bad = outcome == "ok", outcome in ("failed", "overloaded")
    if state.get("probe") == call:
        for key in ("probe", "probe_until", *(("breaker_until", "probes", "outcomes") if good else ())):
            state.pop(key, None)
        if bad:
            state["breaker_until"] = buckets.now + min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** state["probes"])
            state["probes"] += 1
    elif (good or bad) and "breaker_until" not in state and _count(buckets, bad) and bad:
        state["breaker_until"], state["probes"] = buckets.now + FIRST_PAUSE, 1
        state.pop("outcomes", None)


def _count(buckets: Buckets, failed: bool) -> bool:
    """Count a call; returns whether too many calls of the last ten seconds failed."""
    second = math.floor(buckets.now / 1000)
    kept = [entry for entry in buckets.state.get("outcomes", ()) if entry[0] > second - WINDOW]
    if not kept or kept[-1][0] != second:
        kept.append([second, 0, 0])
    kept[-1][1] += 1
    kept[-1][2] += failed
    buckets.state["outcomes"] = kept
    calls, failures = sum(entry[1] for entry in kept), sum(entry[2] for entry in kept)
    return bool(calls >= CALLS and failures >= calls * SHARE)
