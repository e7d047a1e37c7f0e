"""`limiter.lua` and `decisions.py` decide alike: random histories, told to both at the same moments."""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest

from gorgon_common.engine.limits import Ask, Grant, LimitKey, Never, Quota, Settlement, Signal, Wait
from gorgon_common.ratelimit.local import Memory, StoredLimiter
from gorgon_common.ratelimit.redis import RedisLimiter

GATES = [LimitKey("live", "openai", "acme", model) for model in ("gpt-5", "gpt-4o")]
QUOTAS = [
    Quota(requests=600, tokens=90_000, concurrency=8),
    Quota(requests=60, requests_per_day=500, input_tokens=30_000, output_tokens=8_000),
    Quota(requests=6000, input_tokens=600_000, concurrency=20),
    Quota(requests=20),
]
CLOCK = "local clock = call('TIME')\nlocal now = clock[1] * 1000 + clock[2] / 1000 + tonumber(ARGV[1])"


class Book:
    def __init__(self, rng: random.Random) -> None:
        self.assumed = rng.choice(QUOTAS)
        self.ceiling = Quota(concurrency=10**6)

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        return self.assumed, self.ceiling


class Twins:
    """Both limiters at one clock, which stands still until a test moves it."""

    def __init__(self, url: str, book: Book) -> None:
        self.now = 1_800_000_000.0
        self.redis = RedisLimiter(url, book, worker="one")
        text = self.redis._script.script
        body = text.decode() if isinstance(text, bytes) else str(text)
        assert CLOCK in body
        self.redis._script = self.redis._client.register_script(body.replace(CLOCK, "local now = tonumber(ARGV[1])"))
        self.memory = StoredLimiter(Memory(lambda: self.now), book, worker="one")
        self.move(0)

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.redis.clock_offset = self.now

    def ask(self, ask: Ask) -> tuple[Any, Any]:
        return self.redis.acquire(ask), self.memory.acquire(ask)

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        self.redis.settle(grant, settlement)
        self.memory.settle(grant, settlement)

    def snapshots(self) -> list[tuple[Any, Any]]:
        """Return what both show of each gate."""
        ours, theirs = ({gate["model"]: gate for gate in one.snapshot()} for one in (self.redis, self.memory))
        return [(ours[model], theirs[model]) for model in ours.keys() & theirs.keys()]


def told(rng: random.Random) -> Settlement:
    """Return how a call may end."""
    outcome = rng.choices(["ok", "failed", "rate_limited", "overloaded", "neutral"], [80, 6, 3, 3, 8])[0]
    signals = {}
    for name, most in (("requests", 600), ("tokens", 90_000), ("input_tokens", 30_000)):
        if rng.random() < 0.2:
            limit = rng.choice([None, most, most / 2])
            resets = rng.choice([None, 5.0, 30.0])
            signals[name] = Signal(limit, rng.randrange(most), resets, rng.random() < 0.5)
    used = {name: float(rng.randrange(3000)) for name in ("tokens", "input_tokens") if rng.random() < 0.7}
    after = rng.choice([None, 0.5, 4.0]) if outcome in ("rate_limited", "overloaded") else None
    return Settlement(outcome, used, signals, after)


def same(ours: Any, theirs: Any) -> bool:
    match ours, theirs:
        case Grant(), Grant():
            return True
        case Wait(), Wait():
            return bool(ours.why == theirs.why and ours.seconds == pytest.approx(theirs.seconds, abs=0.002, rel=1e-6))
        case Never(), Never():
            return bool(ours == theirs)
    return False


def alike(ours: Any, theirs: Any) -> bool:
    """Compare two snapshots: numbers but for rounding."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = {key for one in (ours, theirs) for key, value in one.items() if value is not None}
        return all(alike(ours.get(key), theirs.get(key)) for key in keys)
    if isinstance(ours, bool) or not isinstance(ours, int | float) or not isinstance(theirs, int | float):
        return bool(ours == theirs)
    return bool(ours == pytest.approx(theirs, abs=0.01, rel=1e-6))


@pytest.mark.parametrize("seed", range(12))
def test_random_histories(redis_url: str, seed: int) -> None:
    rng = random.Random(seed)
    book = Book(rng)
    twins = Twins(redis_url, book)
    held: list[Grant] = []
    weights = {"red": 1.0, "green": 1.0, "blue": rng.choice([1.0, 3.0])}
    sizes = rng.choice([[100], [10, 500, 20_000], [3_000]])
    with contextlib.closing(twins.redis):
        for number in range(600):
            twins.move(rng.choice([0.0, 0.001, 0.02, 0.2, 1.0, 3.0]))
            if rng.random() < 0.002:
                twins.move(rng.choice([70.0, 4_000.0]))
            if rng.random() < 0.01:
                book.assumed = rng.choice(QUOTAS)
            if rng.random() < 0.01:
                book.ceiling = Quota(requests=rng.choice([None, 100.0]), concurrency=10**6)
            action = rng.random()
            if action < 0.3 and held:
                twins.settle(held.pop(rng.randrange(len(held))), told(rng))
            elif action < 0.32 and held:
                assert twins.redis.extend(held) == twins.memory.extend(held)
            elif action < 0.33:
                used = {"requests": float(rng.randrange(50)), "tokens": 4_000.0}
                twins.redis.debit(GATES[0], used)
                twins.memory.debit(GATES[0], used)
            else:
                team = rng.choice(list(weights))
                ask = Ask(
                    f"call-{number}",
                    rng.choices(GATES, [4, 1])[0],
                    tokens_in=rng.choice(sizes),
                    tokens_out=rng.choice([100, 2_000]),
                    team=team,
                    weight=weights[team],
                    ticket=f"ticket-{rng.randrange(12)}" if rng.random() < 0.8 else "",
                )
                ours, theirs = twins.ask(ask)
                assert same(ours, theirs), f"{number}: {ask}: {ours} and {theirs}"
                if isinstance(ours, Grant):
                    held.append(ours)
            if number % 20 == 0:
                for ours, theirs in twins.snapshots():
                    assert alike(ours, theirs), f"{number}: {ours} and {theirs}"
