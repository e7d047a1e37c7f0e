"""The limiter over the dimensions that providers declare: those that have no adapter yet, and random ones.

Each test runs over Redis and over the same decisions in Python.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import pytest
import redis

from gorgon_common.engine.limits import RATE_LIMITED, Answer, Ask, Grant, LimitKey, Never, Quota, Settlement, Wait
from gorgon_common.operations.dimensions import Counts, Dimension
from gorgon_common.operations.providers import PROVIDERS, dimensions_of
from gorgon_common.ratelimit.buckets import VERSION
from gorgon_common.ratelimit.headers import signals
from gorgon_common.ratelimit.limiter import DecidingLimiter
from gorgon_common.ratelimit.local import Memory, StoredLimiter
from gorgon_common.ratelimit.quotas import OwnLimits, QuotaBook, Rule
from gorgon_common.ratelimit.redis import RedisLimiter


class Desk:
    """A limiter with the limits of the descriptors, at a clock that a test moves."""

    def __init__(self, limiter: Any, move: Callable[[float], None]) -> None:
        self.limiter: DecidingLimiter = limiter
        self.move = move
        self.numbers = itertools.count(1)

    def ask(self, provider: str, model: str = "*", **fields: Any) -> Answer:
        name = f"call-{next(self.numbers)}"
        return self.limiter.acquire(Ask(name, LimitKey("live", provider, "acme", model), **fields))

    def granted(self, *args: Any, **fields: Any) -> int:
        """Return how many calls are admitted, each settled at once, before one has to wait."""
        for count in itertools.count():
            answer = self.ask(*args, ticket="greedy", **fields)
            if not isinstance(answer, Grant):
                return count
            self.limiter.settle(answer, Settlement())
        raise AssertionError

    def admitted(self, seconds: int, step: float, *args: Any, **fields: Any) -> int:
        """Return how many calls are admitted in so much (simulated) time."""
        count = 0
        for _ in range(round(seconds / step)):
            self.move(step)
            count += self.granted(*args, **fields)
        return count


@pytest.fixture(params=["redis", "memory"])
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    yield from open_desk(request, request.param, QuotaBook(OwnLimits({}, (), {})))


def open_desk(
    request: pytest.FixtureRequest,
    kind: str,
    book: Any,
    dimensions: Callable[[str], Sequence[Dimension]] = dimensions_of,
) -> Iterator[Desk]:
    now = [1_800_000_000.0]
    limiter: Any
    if kind == "redis":
        limiter = RedisLimiter(request.getfixturevalue("redis_url"), book, worker="one", dimensions=dimensions)
        standing_still(limiter)
        limiter.clock_offset = now[0]
    else:
        limiter = StoredLimiter(Memory(lambda: now[0]), book, worker="one", dimensions=dimensions)

    def move(seconds: float) -> None:
        now[0] += seconds
        limiter.clock_offset = now[0]

    with contextlib.closing(limiter):
        yield Desk(limiter, move)


CLOCK = "local clock = call('TIME')\nlocal now = clock[1] * 1000 + clock[2] / 1000 + tonumber(ARGV[1])"


def standing_still(limiter: Any) -> None:
    """Take the server's clock away: what a test adds to it is the time."""
    text = limiter._script.script
    body = text.decode() if isinstance(text, bytes) else str(text)
    assert CLOCK in body
    limiter._script = limiter._client.register_script(body.replace(CLOCK, "local now = tonumber(ARGV[1])"))


class TestGitHub:
    def test_reads_cost_a_point_and_writes_five(self, desk: Desk) -> None:
        """900 points a minute: reads are bound by the 5,000 requests an hour, writes by the 80 a minute."""
        reads = desk.admitted(600, 0.5, "github", operation="github.get_issue", effect="read")
        assert reads == pytest.approx(600 * 5000 * 0.95 / 3600, rel=0.02)
        assert desk.limiter.snapshot()[0]["levels"].keys() == {"requests", "points", "writes"}

    def test_writes_a_minute(self, desk: Desk) -> None:
        writes = desk.admitted(600, 0.5, "github", operation="github.create_issue", effect="write")
        assert writes == pytest.approx(600 * 80 * 0.95 / 60, rel=0.02)

    def test_points_bind_where_requests_and_writes_do_not(self, desk: Desk) -> None:
        rules = (Rule("github", "*", {"points": 60.0}),)
        desk.limiter._quotas = QuotaBook(OwnLimits({}, rules, {}))
        assert desk.admitted(600, 0.5, "github", effect="read") == pytest.approx(600 * 0.95, rel=0.02)
        desk.move(3600)
        answer = next(a for _ in range(99) if isinstance(a := desk.ask("github", effect="write", ticket="x"), Wait))
        assert answer.why == "points"
        answer = next(a for _ in range(99) if isinstance(a := desk.ask("github", effect="read", ticket="x"), Wait))
        assert answer.seconds < 10

    def test_its_headers_report_the_hour(self, desk: Desk) -> None:
        now = datetime(2026, 12, 1, 12, tzinfo=UTC)

        class Clock:
            def now(self) -> datetime:
                return now

            def monotonic(self) -> float:
                return 0.0

        headers = {
            "x-ratelimit-resource": "core",
            "x-ratelimit-limit": "5000",
            "x-ratelimit-remaining": "2",
            "x-ratelimit-reset": f"{now.timestamp() + 1800:.0f}",
        }
        found = signals("github", headers, clock=Clock())
        assert (found["requests"].remaining, found["requests"].resets) == (2.0, 1800.0)
        assert signals("github", {**headers, "x-ratelimit-resource": "search"}, clock=Clock()) == {}
        desk.granted("github", effect="read")
        desk.move(3600)
        held = desk.ask("github", effect="read")
        assert isinstance(held, Grant)
        desk.limiter.settle(held, Settlement(signals=found))
        assert desk.granted("github", effect="read") == 2


class TestNotion:
    def test_three_requests_a_second_on_average(self, desk: Desk) -> None:
        assert desk.admitted(60, 0.05, "notion") == pytest.approx(60 * 3 * 0.95, abs=3)

    def test_no_burst(self, desk: Desk) -> None:
        desk.move(3600)
        assert desk.granted("notion") <= 3


class TestGmail:
    def test_units_a_second(self, desk: Desk) -> None:
        sent = desk.admitted(60, 0.05, "gmail", operation="gmail.send", effect="send")
        assert sent == pytest.approx(60 * 250 * 0.95 / 100, abs=3)

    def test_small_operations_cost_less(self, desk: Desk) -> None:
        read = desk.admitted(20, 0.01, "gmail", operation="gmail.get_message", effect="read")
        assert read == pytest.approx(20 * 250 * 0.95 / 5, rel=0.02)


class TestSlack:
    def test_methods_have_tiers_of_their_own(self, desk: Desk) -> None:
        history = desk.admitted(600, 0.5, "slack", "conversations.history")
        assert history == pytest.approx(600 * 50 * 0.95 / 60, rel=0.03)
        assert desk.admitted(600, 0.5, "slack", "conversations.list") == pytest.approx(600 * 20 * 0.95 / 60, rel=0.03)

    def post(self, desk: Desk, channel: str, **fields: Any) -> Answer:
        return desk.ask("slack", "chat.postMessage", labels={"channel": channel}, **fields)

    def test_a_message_a_second_for_each_channel(self, desk: Desk) -> None:
        assert isinstance(self.post(desk, "C1"), Grant)
        answer = self.post(desk, "C1", ticket="x")
        assert isinstance(answer, Wait)
        assert (answer.why, answer.seconds) == ("messages", pytest.approx(1.05, abs=0.1))
        assert isinstance(self.post(desk, "C2"), Grant), "another channel does not wait"
        assert isinstance(self.post(desk, "C2", ticket="y"), Wait)
        desk.move(answer.seconds)
        assert isinstance(self.post(desk, "C1", ticket="x"), Grant)

    def test_each_channel_gets_its_own_rate(self, desk: Desk) -> None:
        sent = dict.fromkeys(("C1", "C2", "C3"), 0)
        for _ in range(1200):
            desk.move(0.05)
            for channel in sent:
                answer = self.post(desk, channel, ticket=channel)
                if isinstance(answer, Grant):
                    sent[channel] += 1
                    desk.limiter.settle(answer, Settlement())
        for count in sent.values():
            assert count == pytest.approx(60 * 0.95, abs=3)

    def test_a_channel_that_is_out_of_use_is_forgotten(self, desk: Desk) -> None:
        for number in range(20):
            assert isinstance(self.post(desk, f"C{number}"), Grant)
            desk.move(1)
        assert len(desk.limiter.snapshot()[0]["levels"]) == 21
        desk.move(700)
        assert desk.limiter.snapshot()[0]["levels"].keys() == {"requests"}

    def test_a_refusal_empties_the_channel_of_the_call_only(self, desk: Desk) -> None:
        held = self.post(desk, "C1")
        assert isinstance(held, Grant)
        desk.limiter.settle(held, Settlement(RATE_LIMITED, retry_after=0.0))
        levels = desk.limiter.snapshot()[0]["levels"]
        assert levels["messages/C1"]["level"] <= 0


def test_a_dimension_that_no_call_can_fit_is_told(desk: Desk) -> None:
    desk.limiter._quotas = QuotaBook(OwnLimits({}, (Rule("gmail", "*", {"units": 50.0}),), {}))
    answer = desk.ask("gmail", operation="gmail.send")
    assert isinstance(answer, Never)
    assert (answer.dimension, answer.cost, answer.limit) == ("units", 100, 50)


def test_several_keys_are_decided_at_once(desk: Desk) -> None:
    asks = [
        Ask(f"call-{number}", LimitKey("live", provider, "acme", "*"), ticket=f"t{number}")
        for number, provider in enumerate(["notion", "github", "notion", "notion", "notion", "notion"])
    ]
    answers = desk.limiter.acquire_many(asks)
    assert [isinstance(answer, Grant) for answer in answers] == [True, True, False, False, False, False]
    held = [answer for answer in answers if isinstance(answer, Grant)]
    assert [grant.id for grant in held] == ["call-0", "call-1"]
    desk.limiter.settle_many([(grant, Settlement()) for grant in held])
    assert {gate["provider"]: gate["in_flight"] for gate in desk.limiter.snapshot()} == {"github": 0, "notion": 0}
    assert desk.limiter.acquire_many([]) == []


def test_a_state_of_another_version_is_not_read() -> None:
    memory = Memory(lambda: 1_800_000_000.0)
    memory._documents["live:notion:acme:*"] = {
        "n": {"L requests": 600, "l requests": 500, "a requests": 0},
        "calls": {},
    }
    desk = Desk(StoredLimiter(memory, QuotaBook(OwnLimits({}, (), {})), worker="one"), lambda _: None)
    assert desk.granted("notion") == 1
    assert memory._documents["live:notion:acme:*"]["version"] == VERSION


def commands(client: Any) -> Mapping[str, int]:
    """Return how often each command was called, also inside of the script; without the test's own."""
    stats = {name.removeprefix("cmdstat_"): entry["calls"] for name, entry in client.info("commandstats").items()}
    return {name: calls for name, calls in stats.items() if not name.startswith(("config", "info", "client", "hello"))}


def test_a_call_needs_few_commands(redis_url: str) -> None:
    """Eight for a call alone; in batches of four, two and a half of them."""
    limiter = RedisLimiter(redis_url, QuotaBook(OwnLimits({}, (), {})), worker="one")
    client = redis.Redis.from_url(redis_url)
    gate = LimitKey("sandbox", "openai", "acme", "gpt-5")
    with contextlib.closing(limiter), contextlib.closing(client):
        held = limiter.acquire(Ask("first", gate))
        assert isinstance(held, Grant)
        limiter.settle(held, Settlement())
        client.config_resetstat()
        for number in range(20):
            held = limiter.acquire(Ask(f"call-{number}", gate, tokens_in=100, tokens_out=100))
            assert isinstance(held, Grant)
            limiter.settle(held, Settlement(used={"tokens": 150.0}))
        assert commands(client) == {"evalsha": 40, "time": 40, "mget": 40, "set": 40}
        client.config_resetstat()
        for number in range(5):
            answers = limiter.acquire_many([Ask(f"of {number}, {part}", gate) for part in range(4)])
            limiter.settle_many([(answer, Settlement()) for answer in answers if isinstance(answer, Grant)])
        assert sum(commands(client).values()) == 5 * 8


class Limits:
    """Random limits for random dimensions."""

    def __init__(self, amounts: dict[str, float], concurrency: int) -> None:
        self.amounts, self.concurrency = amounts, concurrency
        self.set: dict[str, float] = {}

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        return Quota(self.concurrency, **self.amounts), Quota(10**6, **self.set)


def some_dimensions(rng: random.Random) -> tuple[Dimension, ...]:
    """Return up to five dimensions of any kind."""
    found = []
    for number in range(rng.randint(1, 5)):
        counts = rng.choice(list(Counts))
        costs = {"read": 1.0, "write": rng.choice([2.0, 5.0]), "*": 3.0} if counts is Counts.OPERATION else {}
        whole = rng.choice([0.0, max(costs.values())]) if costs else float(counts is Counts.CALLS)
        period = rng.choice([1.0, 10.0, 60.0, 3600.0, 86_400.0])
        per = rng.choice(["", "", "channel"]) if counts in (Counts.CALLS, Counts.OPERATION) else ""
        found.append(Dimension(f"d{number}", period, whole, counts, costs, per=per))
    return tuple(found)


@pytest.mark.parametrize("seed", range(16))
def test_random_dimensions_are_decided_alike(request: pytest.FixtureRequest, seed: int) -> None:
    rng = random.Random(seed)
    dimensions = some_dimensions(rng)
    book = Limits(
        {
            dimension.name: dimension.period * rng.choice([1, 5, 50]) * (1 if dimension.counts in _SMALL else 500)
            for dimension in dimensions
            if rng.random() < 0.9
        },
        rng.choice([3, 20, 1000]),
    )
    with contextlib.ExitStack() as stack:
        both = []
        for kind in ("redis", "memory"):
            opened = open_desk(request, kind, book, lambda _: dimensions)
            both.append(next(opened))
            stack.callback(next, opened, None)
        _history(rng, both, dimensions, book)


_SMALL = (Counts.CALLS, Counts.OPERATION)


def _history(rng: random.Random, both: list[Desk], dimensions: Sequence[Dimension], book: Limits) -> None:
    ours, theirs = (desk.limiter for desk in both)
    gate, held = LimitKey("live", "any", "acme", "*"), list[Grant]()
    for number in range(300):
        seconds = rng.choice([0.0, 0.01, 0.1, 0.7, 3.0, 3.0, 700.0 if rng.random() < 0.02 else 0.2])
        for desk in both:
            desk.move(seconds)
        action = rng.random()
        if action < 0.02:
            book.set = {dimension.name: 20.0 * dimension.period for dimension in dimensions if rng.random() < 0.3}
        elif action < 0.35 and held:
            ended = [held.pop(rng.randrange(len(held))) for _ in range(min(len(held), rng.randint(1, 3)))]
            settlements = [(grant, _settlement(rng, dimensions)) for grant in ended]
            ours.settle_many(settlements)
            theirs.settle_many(settlements)
        else:
            asks = [_ask(rng, f"{number}-{part}", gate) for part in range(rng.choice([1, 1, 3]))]
            for ask, one, other in zip(asks, ours.acquire_many(asks), theirs.acquire_many(asks), strict=True):
                assert alike(one, other), f"{number}: {ask}: {one} and {other}"
                if isinstance(one, Grant):
                    held.append(one)
        if number % 20 == 0:
            for one, other in zip(_shown(ours), _shown(theirs), strict=True):
                assert one == pytest.approx(other, rel=1e-6, abs=0.01)


def _shown(limiter: Any) -> list[dict[str, float]]:
    """Return the numbers of each key."""
    states = limiter.snapshot()
    counts = ("in_flight", "waiting", "granted", "denied", "refused", "rate", "closed", "breaker")
    return [
        {
            **{name: float(state[name]) for name in counts},
            **{f"{name}.level": level["level"] for name, level in state["levels"].items()},
            **{f"{name}.limit": level["limit"] for name, level in state["levels"].items()},
        }
        for state in states
    ]


def _ask(rng: random.Random, name: str, gate: LimitKey) -> Ask:
    return Ask(
        name,
        gate,
        tokens_in=rng.choice([10, 1000]),
        tokens_out=rng.choice([0, 300]),
        team=rng.choice(["red", "green"]),
        ticket=f"ticket-{rng.randrange(8)}",
        effect=rng.choice(["read", "write", "send"]),
        labels={"channel": rng.choice("abc")} if rng.random() < 0.9 else {},
    )


def _settlement(rng: random.Random, dimensions: Sequence[Dimension]) -> Settlement:
    outcome = rng.choices(["ok", "failed", "rate_limited", "overloaded"], [80, 8, 6, 6])[0]
    used = {
        dimension.name: float(rng.randrange(600))
        for dimension in dimensions
        if dimension.counts not in _SMALL and rng.random() < 0.7
    }
    return Settlement(outcome, used, retry_after=rng.choice([None, 0.5]))


def alike(one: Answer, other: Answer) -> bool:
    match one, other:
        case Grant(), Grant():
            return True
        case Wait(), Wait():
            return one.why == other.why and one.seconds == pytest.approx(other.seconds, rel=1e-6, abs=0.002)
        case Never(), Never():
            return one == other
    return False


def test_every_limit_of_a_provider_binds(desk: Desk) -> None:
    """Whatever the descriptors declare, a call is admitted in the end, and not all calls are at once."""
    for name, provider in PROVIDERS.items():
        for pattern in provider.tiers.get(provider.tier, {}):
            model = pattern.replace("*", "x")
            fields: dict[str, Any] = {
                "labels": {"channel": "C1"},
                "effect": "write",
                "tokens_out": 100,
                "tokens_in": 10,
            }
            for _ in range(100):
                if isinstance(answer := desk.ask(name, model, ticket="x", **fields), Grant):
                    break
                assert isinstance(answer, Wait)
                desk.move(answer.seconds)
            assert isinstance(answer, Grant), f"{name} {model}"
            waited = any(isinstance(desk.ask(name, model, ticket="x", **fields), Wait) for _ in range(500))
            assert waited, f"{name} {model}"
