"""The limiter's state of one key, and its buckets: the part of the decisions that fills and empties them.

`limiter.lua` makes the same decisions and its comments give the reasons.  Times are in milliseconds.

The state of a key (the fields that exist once there is something to say):

| field | |
|---|---|
| `fill`, `agreed_at` | the share of each limit that is refilled, FIRST to FULL; when the headers last agreed |
| `slowdown`, `slowed_at`, `refusals` | the factor after refused calls, FLOOR to 1; when it was last lowered; how many in a row |
| `closed` | until when the provider asked for a pause (in the state of the account too) |
| `granted`, `denied`, `refused` | counts of calls admitted, told to wait, and answered with 429 |
| `latency`, `mean_share` | moving averages: of a call's duration, and of its share (seconds of the capacity) |
| `outcomes` | [second, calls, failures] of the last ten seconds |
| `breaker_until`, `probes`, `probe`, `probe_until` | when the breaker admits a trial call; how many failed; the id of the one that runs; when another may follow |
| `virtual`, `finish`, `weights` | fair queueing: the virtual time; each team's finish tag; the weights of the waiting teams |
| `teams` | waiting team → `tag`, `weight`, `came` and `gone` (calls that arrived and left), `first` (its first known waiting call: `member`, `place`, `since`, `due`, `cost`) |
| `waiting`, `in_flight`, `tidy_at` | counts; when the next entry expires (Redis only; the twin looks at all of them) |
| `calls` | call in flight → `ends` (its lease), `team`, `weight`, `at`, `number`, `share`, `lease`, `reserved` and `before` by dimension (`spent` at its start) |
| `workers` | worker → when it last asked |
| `dimensions` | name → a bucket |

A bucket: `period`, `whole` and `labelled` (declared), `limit` (in force), `learned` (from a header), `ceiling` (set by a
person), `level` at the time `at`, `spent` (everything admitted so far), `mean` cost of a call; what the provider reported:
`left` at `left_at` after the call with number `left_by`, valid until `left_until`; `window` (fixed, not refilled
continuously), `resets`, and its first value `reset_first` since `reset_since`.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

BURST, READY = 0.05, 0.5
FIRST, FULL = 0.95, 1.0
IDLE = 600_000.0
VERSION = 2
"""A stored state of another version is not read: the key starts with one second's worth."""

State = dict[str, Any]
Bucket = dict[str, Any]


def fresh() -> State:
    """Return the state of an unused key."""
    counts = dict.fromkeys(("granted", "denied", "refused", "refusals", "virtual", "weights"), 0)
    parts: dict[str, Any] = {
        name: {} for name in ("dimensions", "calls", "workers", "finish", "teams", "due", "places")
    }
    return {"version": VERSION, "fill": FIRST, "slowdown": 1.0, **counts, **parts}


class Buckets:
    """The buckets of one key at one moment; changes `state` in place.

    `scale`: the fraction of every limit that may be used here; less than 1 in a worker without Redis.
    """

    def __init__(self, state: State, account: State, now: float, scale: float) -> None:
        self.state = state
        self.account = account
        self.now = now
        self.scale = scale
        self.dimensions: dict[str, Bucket] = state["dimensions"]

    def limited(self) -> Iterator[tuple[str, Bucket]]:
        """Yield the buckets that have a limit, by dimension."""
        return ((name, bucket) for name, bucket in self.dimensions.items() if bucket.get("limit") is not None)

    def capacity(self, bucket: Bucket) -> float:
        """Return the capacity of a bucket."""
        return float(max(BURST * bucket["limit"], 1.5 * bucket["whole"]))

    def rate(self, bucket: Bucket) -> float:
        """Return the refill per millisecond."""
        return float(bucket["limit"] * self.state["fill"] * self.state["slowdown"] / bucket["period"])

    def level(self, bucket: Bucket) -> float:
        """Return the current level."""
        cap, has = self.capacity(bucket), bucket.get("level")
        if has is None:
            return float(min(cap, max(bucket["limit"] * FIRST * 1000 / bucket["period"], bucket["whole"])))
        if has >= cap:
            return float(has)
        return float(min(cap, has + max(0.0, self.now - bucket["at"]) * self.rate(bucket)))

    def put(self, bucket: Bucket, value: float) -> None:
        """Set the level."""
        bucket["level"], bucket["at"] = value, self.now

    def refresh(self) -> None:
        """Bring the levels up to date; required before a rate changes."""
        for _, bucket in self.limited():
            self.put(bucket, self.level(bucket))

    def starts(self, bucket: Bucket, cost: float) -> float:
        """Return the level that a call needs to start."""
        return cost if bucket["whole"] > 0 else min(cost, self.capacity(bucket) * READY)

    def told(self, bucket: Bucket) -> float | None:
        """Return what is left according to the provider, None where unknown."""
        left = bucket.get("left")
        if left is None or self.now >= bucket["left_until"]:
            return None
        if bucket.get("window"):
            return float(left)
        return float(left + max(0.0, self.now - bucket["left_at"]) * bucket["limit"] / bucket["period"])

    def is_idle(self, bucket: Bucket) -> bool:
        """Return whether a bucket belongs to a label that was not used for long, so that it can be forgotten."""
        return bool(bucket["labelled"]) and self.now - bucket.get("at", self.now) >= IDLE
