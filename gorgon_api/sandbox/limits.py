"""Rate limits of an account and model: token buckets or fixed windows, as providers run them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

DIMENSIONS = ("requests", "tokens", "input_tokens", "output_tokens")


@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of an account.

    `provider`, `account` and `model` are patterns (`*`, `gpt-*`).  `requests` and the tokens are for `per` seconds;
    None is no limit.  `mode`: `bucket` refills continuously up to `burst` (a share of the limit); `window` starts
    afresh every `window` seconds, with the limit's share of that time.  `concurrent` bounds calls in flight.
    `quota_tokens` is all that the account has; when it is used up, every call is rejected.  `retry_after:
    false` leaves the header out of a 429.
    """

    provider: str = "*"
    account: str = "*"
    model: str = "*"
    requests: float | None = 600_000
    tokens: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    per: float = 60.0
    mode: str = "bucket"
    burst: float = 1.0
    window: float = 10.0
    concurrent: int | None = None
    quota_tokens: int | None = None
    retry_after: bool = True

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> Limit:
        """Return the limit that a JSON object describes.  Raises ValueError."""
        known = {field.name for field in fields(cls)}
        if unknown := sorted(given.keys() - known):
            raise ValueError(f"a limit has no {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        limit = cls(**{"requests": None, **given})
        if limit.mode not in ("bucket", "window"):
            raise ValueError(f"mode is bucket or window, not {limit.mode!r}")
        for name in (*DIMENSIONS, "per", "burst", "window", "concurrent", "quota_tokens"):
            value = getattr(limit, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
                raise ValueError(f"{name} has to be a number above 0, not {value!r}")
        return limit

    def applies(self, provider: str, account: str, model: str) -> bool:
        """Return whether this limit applies to such calls."""
        return (
            fnmatchcase(provider, self.provider)
            and fnmatchcase(account, self.account)
            and fnmatchcase(model, self.model)
        )


DEFAULTS = (
    Limit(provider="openai", tokens=600_000_000),
    Limit(provider="anthropic", input_tokens=400_000_000, output_tokens=100_000_000),
    Limit(),
)


class Bucket:
    """A level that refills continuously.  It goes below zero if a call is larger than estimated."""

    def __init__(self, limit: float, per: float, capacity: float, now: float) -> None:
        self.limit = limit
        self.capacity = capacity
        self._rate = limit / per
        self._level = capacity
        self._at = now

    def level(self, now: float) -> float:
        """Return the level at `now` (seconds)."""
        if now > self._at:
            self._level = min(self.capacity, self._level + (now - self._at) * self._rate)
            self._at = now
        return self._level

    def take(self, amount: float, now: float) -> None:
        """Remove `amount` (return it if negative)."""
        self._level = min(self.capacity, self.level(now) - amount)

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is available; 0 if it is now, infinity if it never will be."""
        if amount > self.capacity:
            return math.inf
        missing = amount - self.level(now)
        return max(0.0, missing / self._rate) if missing > 1e-9 else 0.0

    def full_in(self, now: float) -> float:
        """Return the seconds until it is full again."""
        return (self.capacity - self.level(now)) / self._rate


class Window:
    """A counter that is reset at the end of each time window."""

    def __init__(self, limit: float, per: float, seconds: float) -> None:
        self.limit = limit
        self.capacity = limit * seconds / per
        self._seconds = seconds
        self._used = 0.0
        self._number = -1

    def level(self, now: float) -> float:
        """Return what is left in the window of `now`."""
        number = math.floor(now / self._seconds)
        if number != self._number:
            self._number = number
            self._used = 0.0
        return self.capacity - self._used

    def take(self, amount: float, now: float) -> None:
        """Use `amount` of the window (return it if negative)."""
        self.level(now)
        self._used = max(0.0, self._used + amount)

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is there, 0 where it is, infinity where it never will be."""
        if amount > self.capacity:
            return math.inf
        return self.full_in(now) if amount > self.level(now) + 1e-9 else 0.0

    def full_in(self, now: float) -> float:
        """Return the seconds until the window ends."""
        return (math.floor(now / self._seconds) + 1) * self._seconds - now


@dataclass(frozen=True, slots=True)
class Level:
    """One dimension for the headers: `reset` is the seconds until it is full again."""

    limit: float
    remaining: float
    reset: float


@dataclass(frozen=True, slots=True)
class Denied:
    """Why a call is not admitted.  `kind` is a dimension or `concurrent`; `wait` is in seconds (infinity: never)."""

    kind: str
    wait: float
    limit: float
    used: float
    requested: float
    retry_after: bool


class Gate:
    """The state of one limit for one account and model."""

    def __init__(self, limit: Limit, now: float) -> None:
        self.limit = limit
        self.meters: dict[str, Bucket | Window] = {}
        for name in DIMENSIONS:
            allowed = getattr(limit, name)
            if allowed is None:
                continue
            if limit.mode == "window":
                self.meters[name] = Window(allowed, limit.per, limit.window)
            else:
                self.meters[name] = Bucket(allowed, limit.per, max(1.0, allowed * limit.burst), now)
        self.in_flight = 0

    def admit(self, costs: Mapping[str, float], now: float) -> Denied | None:
        """Reserve all of `costs` (by dimension) or nothing; return the reason for a denial."""
        limit = self.limit
        if limit.concurrent is not None and self.in_flight >= limit.concurrent:
            return Denied("concurrent", 1.0, limit.concurrent, self.in_flight, 1, limit.retry_after)
        worst: Denied | None = None
        for name, meter in self.meters.items():
            cost = costs.get(name, 0.0)
            wait = meter.wait(cost, now)
            if wait > 0 and (worst is None or wait > worst.wait):
                used = meter.capacity - meter.level(now)
                worst = Denied(name, wait, meter.limit, used, cost, limit.retry_after)
        if worst is not None:
            return worst
        for name, meter in self.meters.items():
            meter.take(costs.get(name, 0.0), now)
        self.in_flight += 1
        return None

    def settle(self, reserved: Mapping[str, float], actual: Mapping[str, float], now: float) -> None:
        """Replace the reservation with the actual usage."""
        for name, meter in self.meters.items():
            difference = actual.get(name, 0.0) - reserved.get(name, 0.0)
            if difference:
                meter.take(difference, now)

    def leave(self) -> None:
        """End an admitted call."""
        self.in_flight = max(0, self.in_flight - 1)

    def levels(self, now: float) -> dict[str, Level]:
        """Return every dimension for the headers."""
        return {
            name: Level(meter.limit, max(0.0, meter.level(now)), max(0.0, meter.full_in(now)))
            for name, meter in self.meters.items()
        }


class Limits:
    """The limits of all accounts.  Later rules take precedence; the defaults are generous."""

    def __init__(self) -> None:
        self._rules: list[Limit] = []
        self._gates: dict[tuple[str, str, str], Gate] = {}
        self._spent: dict[tuple[str, str], int] = {}

    def add(self, limit: Limit) -> None:
        """Add a rule; the accounts that it covers are reset."""
        self._rules.insert(0, limit)
        for key in [key for key in self._gates if limit.applies(*key)]:
            del self._gates[key]

    def clear(self) -> None:
        """Restore the defaults, with every account full."""
        self._rules.clear()
        self._gates.clear()
        self._spent.clear()

    def gate(self, provider: str, account: str, model: str, now: float) -> Gate:
        """Return the state for one account and model."""
        key = (provider, account, model)
        gate = self._gates.get(key)
        if gate is None:
            rule = next(rule for rule in (*self._rules, *DEFAULTS) if rule.applies(*key))
            gate = self._gates[key] = Gate(rule, now)
        return gate

    def quota_left(self, gate: Gate, provider: str, account: str) -> bool:
        """Return whether the account still has tokens; an account without a quota always has."""
        quota = gate.limit.quota_tokens
        return quota is None or self._spent.get((provider, account), 0) < quota

    def spend(self, provider: str, account: str, tokens: int) -> None:
        """Count tokens against the account's quota."""
        self._spent[(provider, account)] = self._spent.get((provider, account), 0) + tokens

    def describe(self, now: float) -> dict[str, Any]:
        """Return the rules and what every account has left."""
        states = [
            {
                "provider": provider,
                "account": account,
                "model": model,
                "in_flight": gate.in_flight,
                "remaining": {name: round(level.remaining, 3) for name, level in gate.levels(now).items()},
            }
            for (provider, account, model), gate in self._gates.items()
        ]
        rules = [{field.name: getattr(rule, field.name) for field in fields(rule)} for rule in self._rules]
        return {"rules": rules, "accounts": states}
