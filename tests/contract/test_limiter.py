"""What every limiter must do, over Redis, SQLite and memory: one suite for all, and the heart of it over PostgreSQL.

Time is moved by an offset to the clock of the store, never by sleeping.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from gorgon_common.engine.limits import (
    FAILED,
    NEUTRAL,
    OVERLOADED,
    RATE_LIMITED,
    Ask,
    Grant,
    Limiter,
    LimitKey,
    Never,
    Quota,
    Settlement,
    Signal,
    Wait,
)
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.limits import LimitStates
from gorgon_common.ratelimit.local import Memory, StoredLimiter
from gorgon_common.ratelimit.redis import RedisLimiter

GATE = LimitKey("live", "openai", "acme", "gpt-5")
OTHER = LimitKey("live", "openai", "acme", "gpt-4o")
OPEN = Quota(concurrency=10**6)


class Book:
    """Quotas that a test sets."""

    def __init__(self) -> None:
        self.assumed = Quota(requests=600)
        self.ceiling = OPEN

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        return self.assumed, self.ceiling


@dataclass
class Desk:
    """A limiter whose clock and quotas a test moves, with short words for what it asks."""

    limiter: Limiter
    book: Book
    move: Callable[[float], None]
    forget: Callable[[], None]
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    def ask(self, team: str = "default", **fields: Any) -> Any:
        ask: dict[str, Any] = {"id": f"call-{next(self.numbers)}", "gate": GATE, "team": team, **fields}
        return self.limiter.acquire(Ask(**ask))

    def grants(self, most: int = 1000, **fields: Any) -> list[Grant]:
        """Ask until there is no more, all by one waiter."""
        found: list[Grant] = []
        while len(found) < most:
            answer = self.ask(ticket="greedy", **fields)
            if not isinstance(answer, Grant):
                break
            found.append(answer)
        return found

    def settle(self, grant: Grant, outcome: str = "ok", **fields: Any) -> None:
        self.limiter.settle(grant, Settlement(outcome, **fields))

    def state(self) -> dict[str, Any]:
        return next(gate for gate in self.limiter.snapshot() if gate["model"] == "gpt-5")

    def level(self, dimension: str = "requests") -> float:
        return float(self.state()["levels"][dimension]["level"])

    def warm(self, seconds: float = 30.0) -> None:
        """Use the gate once and let its buckets fill."""
        self.settle(self.ask())
        self.move(seconds)


@pytest.fixture(params=["redis", "sqlite", "memory"])
def desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    yield from open_desk(request.param, request)


@pytest.fixture
def postgres_desk(request: pytest.FixtureRequest) -> Iterator[Desk]:
    yield from open_desk("postgresql", request)


def open_desk(kind: str, request: pytest.FixtureRequest) -> Iterator[Desk]:
    """Yield a limiter over redis, sqlite, postgresql or memory."""
    book = Book()
    offset = [0.0]
    with contextlib.ExitStack() as stack:
        limiter: Any
        if kind == "redis":
            url = request.getfixturevalue("redis_url")
            limiter = RedisLimiter(url, book, worker="one")
            client = stack.enter_context(contextlib.closing(redis.Redis.from_url(url)))
            forget: Callable[[], Any] = client.flushall
        elif kind in ("sqlite", "postgresql"):
            name = "sqlite_url" if kind == "sqlite" else "postgres_url"
            database = Database(request.getfixturevalue(name))
            stack.callback(database.close)
            limiter = StoredLimiter(LimitStates(database), book, worker="one")

            def forget() -> None:
                with database.write() as connection:
                    connection.exec_driver_sql("DELETE FROM limit_states")
        else:
            memory = Memory(lambda: time.time() + offset[0])
            limiter = StoredLimiter(memory, book, worker="one")
            forget = memory._documents.clear

        def move(seconds: float) -> None:
            offset[0] += seconds
            if kind == "redis":
                limiter.clock_offset = offset[0]
            elif kind in ("sqlite", "postgresql"):
                database.clock_offset = offset[0]

        stack.callback(limiter.close)
        yield Desk(limiter, book, move, forget)


class TestBuckets:
    def test_a_cold_gate_gives_one_seconds_worth(self, desk: Desk) -> None:
        """600 a minute, refilled at 0.95: nine at once, then one each 105 ms."""
        assert 9 <= len(desk.grants()) <= 10
        answer = desk.ask()
        assert isinstance(answer, Wait)
        assert answer.why == "requests"
        assert 0 < answer.seconds < 0.3

    def test_a_cold_gate_lets_in_what_needs_more_than_one_seconds_worth(self, desk: Desk) -> None:
        """The smallest tier: 8,000 output tokens a minute are 127 a second, and a call starts at 200."""
        desk.book.assumed = Quota(requests=50, output_tokens=8_000)
        answer = desk.ask(tokens_out=4_000, ticket="x")
        assert isinstance(answer, Wait)
        assert answer.seconds == pytest.approx((200 - 127) / 127, abs=0.05)
        desk.move(answer.seconds + 0.01)
        assert isinstance(desk.ask(tokens_out=4_000, ticket="x"), Grant)

    def test_what_is_saved_up_is_a_twentieth_of_the_limit(self, desk: Desk) -> None:
        desk.warm(3600)
        assert 30 <= len(desk.grants()) <= 31

    def test_a_minute_never_gives_more_than_the_limit_before_headers_agree(self, desk: Desk) -> None:
        desk.warm(60)
        total, began = 0, time.monotonic()
        for _ in range(60):
            made = desk.grants()
            total += len(made)
            for grant in made:
                desk.settle(grant)
            desk.move(1)
        assert 590 <= total <= 601 + 9.5 * (time.monotonic() - began)

    def test_all_or_nothing(self, desk: Desk) -> None:
        """Where one dimension has no room, nothing is taken from the others."""
        desk.book.assumed = Quota(requests=600, input_tokens=60_000)
        desk.warm()
        before = desk.level()
        taken = desk.grants(tokens_in=1_000)
        assert 0 < len(taken) < 6
        assert desk.level() == pytest.approx(before - len(taken), abs=0.5)

    def test_settling_gives_back_what_was_not_used(self, desk: Desk) -> None:
        desk.book.assumed = Quota(tokens=600_000)
        desk.warm()
        full = desk.level("tokens")
        grant = desk.ask(tokens_in=100, tokens_out=4_000)
        assert desk.level("tokens") == pytest.approx(full - 4_000, abs=600)
        desk.settle(grant, used={"tokens": 300.0})
        assert desk.level("tokens") == pytest.approx(full - 300, abs=600)

    def test_settling_twice_counts_once(self, desk: Desk) -> None:
        desk.book.assumed = Quota(tokens=600_000)
        desk.warm()
        grant = desk.ask(tokens_in=100, tokens_out=20_000)
        desk.settle(grant, used={"tokens": 15_000.0})
        once = desk.level("tokens")
        desk.settle(grant, used={"tokens": 0.0})
        assert desk.level("tokens") == pytest.approx(once, abs=3000)

    def test_a_call_that_used_more_leaves_a_debt(self, desk: Desk) -> None:
        desk.book.assumed = Quota(input_tokens=60_000)
        desk.warm()
        desk.settle(desk.ask(tokens_in=10), used={"input_tokens": 13_000.0})
        assert desk.level("input_tokens") == pytest.approx(-10_000, abs=200)
        answer = desk.ask(tokens_in=10)
        assert isinstance(answer, Wait)
        assert answer.seconds == pytest.approx(10_000 / 950, rel=0.1)
        assert answer.why == "input_tokens"

    def test_a_call_larger_than_the_burst_goes_into_debt_and_the_rate_still_holds(self, desk: Desk) -> None:
        desk.book.assumed = Quota(input_tokens=60_000)
        desk.warm()
        count = 0
        for _ in range(600):
            desk.move(1)
            count += len(desk.grants(tokens_in=10_000))
        assert count == pytest.approx(600 * 950 / 10_000, abs=2)

    def test_what_never_fits_is_told_at_once(self, desk: Desk) -> None:
        desk.book.assumed = Quota(input_tokens=30_000)
        answer = desk.ask(tokens_in=30_001)
        assert isinstance(answer, Never)
        assert (answer.dimension, answer.cost, answer.limit) == ("input_tokens", 30_001, 30_000)
        assert "30,001 input tokens" in answer.why

    def test_asking_again_with_the_same_call_costs_nothing(self, desk: Desk) -> None:
        desk.warm()
        full = desk.level()
        assert isinstance(desk.ask(id="same"), Grant)
        assert isinstance(desk.ask(id="same"), Grant)
        assert desk.level() == pytest.approx(full - 1, abs=0.5)
        assert desk.state()["in_flight"] == 1

    def test_requests_per_day(self, desk: Desk) -> None:
        desk.book.assumed = Quota(requests_per_day=200)
        assert len(desk.grants()) == 1
        answer = desk.ask(ticket="greedy")
        assert isinstance(answer, Wait)
        assert answer.why == "requests_per_day"
        desk.move(86_400)
        assert len(desk.grants()) == 10

    def test_without_a_limit_everything_passes(self, desk: Desk) -> None:
        desk.book.assumed = Quota(concurrency=10_000)
        assert len(desk.grants(300, tokens_in=10**6, tokens_out=10**6)) == 300

    def test_models_have_buckets_of_their_own(self, desk: Desk) -> None:
        desk.grants()
        assert isinstance(desk.ask(), Wait)
        assert isinstance(desk.ask(gate=OTHER), Grant)

    def test_a_clock_that_jumps_gives_no_more_than_the_burst(self, desk: Desk) -> None:
        desk.warm()
        desk.move(10 * 365 * 86_400)
        assert 30 <= len(desk.grants()) <= 31
        desk.move(-10 * 365 * 86_400)
        assert len(desk.grants()) <= 1
        assert math.isfinite(desk.level())

    def test_what_was_used_without_asking_is_taken_off(self, desk: Desk) -> None:
        """No more than can be saved up: while nobody could ask, nothing was lost of what came back."""
        limiter: Any = desk.limiter
        desk.book.assumed = Quota(requests=600, requests_per_day=10_000)
        desk.warm(3600)
        days = desk.level("requests_per_day")
        limiter.debit(GATE, {"requests": 12.0, "requests_per_day": 12.0, "tokens": 500.0})
        assert desk.level() == pytest.approx(30 - 12, abs=1)
        limiter.debit(GATE, {"requests": 500.0, "requests_per_day": 500.0})
        assert desk.level() == pytest.approx(30 - 12 - 30, abs=1)
        assert desk.level("requests_per_day") == pytest.approx(days - 512, abs=1)

    def test_lost_state_starts_with_one_second_again(self, desk: Desk) -> None:
        desk.warm(3600)
        held = desk.ask()
        desk.forget()
        assert 9 <= len(desk.grants()) <= 10
        desk.settle(held)  # of a call that nobody remembers: nothing happens
        assert isinstance(desk.ask(), Wait)

    def test_many_at_once_never_get_more_than_there_is(self, desk: Desk) -> None:
        desk.warm(3600)
        begun = time.monotonic()
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda number: desk.ask(ticket=f"t{number % 16}"), range(200)))
        granted = sum(isinstance(answer, Grant) for answer in answers)
        # 30 that were saved up, and what came back meanwhile: at most 10 a second
        assert 24 <= granted <= 31 + 10 * (time.monotonic() - begun)


class TestLeases:
    def test_calls_in_flight_are_bounded(self, desk: Desk) -> None:
        desk.book.assumed = Quota(concurrency=3)
        held = desk.grants()
        assert len(held) == 3
        answer = desk.ask(ticket="greedy")
        assert isinstance(answer, Wait)
        assert answer.why == "concurrency"
        desk.settle(held[0])
        assert len(desk.grants()) == 1

    def test_a_crash_frees_its_lease(self, desk: Desk) -> None:
        desk.book.assumed = Quota(concurrency=3)
        desk.grants()
        desk.move(59)
        assert desk.state()["in_flight"] == 3
        desk.move(2)
        assert desk.state()["in_flight"] == 0
        assert len(desk.grants()) == 3

    def test_who_lives_keeps_it(self, desk: Desk) -> None:
        desk.book.assumed = Quota(concurrency=3)
        held = desk.grants()
        desk.move(50)
        assert desk.limiter.extend(held[:2]) == 2
        desk.move(50)
        assert desk.state()["in_flight"] == 2
        assert desk.limiter.extend(held) == 2

    def test_the_smaller_concurrency_holds(self, desk: Desk) -> None:
        desk.book.assumed, desk.book.ceiling = Quota(concurrency=50), Quota(concurrency=2)
        assert len(desk.grants()) == 2


class TestHeaders:
    def headers(self, **fields: Any) -> dict[str, Any]:
        return {"signals": {"requests": Signal(**fields)}}

    def test_they_change_the_capacity_both_ways(self, desk: Desk) -> None:
        desk.warm()
        desk.settle(desk.ask(), **self.headers(limit=120.0))
        assert desk.state()["levels"]["requests"]["limit"] == 120
        assert desk.level() <= 6
        desk.settle(desk.ask(), **self.headers(limit=6000.0))
        assert desk.state()["levels"]["requests"]["limit"] == 6000

    def test_a_limit_that_a_person_has_set_is_kept_to(self, desk: Desk) -> None:
        desk.book.ceiling = Quota(requests=100, concurrency=10**6)
        desk.settle(desk.ask(), **self.headers(limit=6000.0))
        assert desk.state()["levels"]["requests"]["limit"] == 100
        assert desk.state()["levels"]["requests"]["set"] is True
        desk.move(10)
        desk.settle(desk.ask(), **self.headers(limit=6000.0))
        assert desk.state()["levels"]["requests"]["limit"] == 100
        desk.settle(desk.ask(), **self.headers(limit=60.0))
        assert desk.state()["levels"]["requests"]["set"] is False

    def test_they_teach_limits_that_nobody_has_configured(self, desk: Desk) -> None:
        desk.book.assumed = Quota()
        desk.settle(desk.ask(), **self.headers(limit=60.0, remaining=59.0))
        assert len(desk.grants()) <= 2

    def test_they_lower_what_may_be_used(self, desk: Desk) -> None:
        """Somebody else uses the account: the provider has four left, whatever we have counted."""
        desk.warm(3600)
        desk.settle(desk.ask(), **self.headers(limit=600.0, remaining=4.0, resets=59.0))
        assert 4 <= len(desk.grants()) <= 5

    def test_they_never_raise_it(self, desk: Desk) -> None:
        desk.grants()
        held = desk.ask(ticket="greedy")
        desk.move(0.2)
        held = desk.ask(ticket="greedy")
        assert isinstance(held, Grant)
        desk.settle(held, **self.headers(limit=600.0, remaining=600.0, resets=0.0))
        assert len(desk.grants()) <= 2

    def test_an_old_reply_tells_less_than_a_new_one(self, desk: Desk) -> None:
        desk.warm(3600)
        first, second = desk.ask(), desk.ask()
        desk.settle(second, **self.headers(limit=600.0, remaining=500.0, resets=10.0))
        desk.settle(first, **self.headers(limit=600.0, remaining=1.0, resets=10.0))
        assert len(desk.grants()) >= 25

    def test_calls_under_way_are_counted_against_what_is_left(self, desk: Desk) -> None:
        """The provider had ten left when the first was let in; four more have been sent since."""
        desk.warm(3600)
        first = desk.ask()
        desk.grants(4)
        desk.settle(first, **self.headers(limit=600.0, remaining=10.0, resets=59.0))
        assert 6 <= len(desk.grants()) <= 7

    def test_agreeing_headers_win_the_whole_limit(self, desk: Desk) -> None:
        desk.settle(desk.ask())
        assert desk.state()["rate"] == pytest.approx(0.95)
        for _ in range(8):
            desk.move(1)
            desk.settle(desk.ask(), **self.headers(limit=600.0, remaining=500.0, resets=10.0))
        assert desk.state()["rate"] == pytest.approx(1.0)

    def test_disagreeing_ones_do_not(self, desk: Desk) -> None:
        for _ in range(8):
            desk.move(1)
            answer = desk.ask()
            if isinstance(answer, Grant):
                desk.settle(answer, **self.headers(limit=600.0, remaining=0.0, resets=10.0))
        assert desk.state()["rate"] == pytest.approx(0.95)

    def test_a_window_is_told_from_a_bucket(self, desk: Desk) -> None:
        """The moment of the reset stands still: nothing comes back before it, and at it all of that is forgotten."""
        desk.warm(3600)
        for left in range(30, 27, -1):
            desk.settle(desk.ask(), **self.headers(limit=600.0, remaining=float(left), resets=10.0 - (30 - left)))
            desk.move(1)
        desk.settle(desk.ask(), **self.headers(limit=600.0, remaining=2.0, resets=7.0))
        assert len(desk.grants()) == 2
        answer = desk.ask(ticket="greedy")
        assert isinstance(answer, Wait)
        assert answer.seconds == pytest.approx(7.0, abs=0.5)
        desk.move(3)
        assert isinstance(desk.ask(ticket="greedy"), Wait)
        desk.move(4.2)
        assert len(desk.grants()) >= 20

    def test_a_header_of_a_window_that_is_over_says_nothing(self, desk: Desk) -> None:
        desk.warm(3600)
        held = desk.ask()
        desk.move(1)
        desk.settle(held, **self.headers(limit=600.0, remaining=0.0, resets=0.5))
        assert len(desk.grants()) >= 28


class TestRefusals:
    def test_retry_after_closes_it_for_everybody_until_then(self, desk: Desk) -> None:
        desk.warm()
        held = desk.ask()
        desk.settle(held, RATE_LIMITED, retry_after=8.0, signals={"requests": Signal(limit=600.0)})
        for team in ("default", "other"):
            answer = desk.ask(team)
            assert isinstance(answer, Wait)
            assert answer.why == "retry_after"
            assert answer.seconds >= 7.9
        desk.move(7.8)
        assert isinstance(desk.ask(ticket="greedy"), Wait)
        desk.move(0.3)
        assert isinstance(desk.ask(ticket="greedy"), Grant)

    def test_a_shorter_pause_does_not_end_a_longer_one(self, desk: Desk) -> None:
        desk.warm()
        first, second = desk.ask(), desk.ask()
        desk.settle(first, RATE_LIMITED, retry_after=8.0, signals={"requests": Signal(limit=600.0)})
        desk.settle(second, RATE_LIMITED, retry_after=1.0, signals={"requests": Signal(limit=600.0)})
        desk.move(2)
        assert isinstance(desk.ask(), Wait)

    def test_headers_say_that_it_is_this_model_alone(self, desk: Desk) -> None:
        desk.settle(desk.ask(), RATE_LIMITED, retry_after=8.0, signals={"requests": Signal(limit=600.0)})
        assert isinstance(desk.ask(gate=OTHER), Grant)

    def test_without_headers_it_is_the_whole_account(self, desk: Desk) -> None:
        desk.settle(desk.ask(), RATE_LIMITED, retry_after=8.0)
        answer = desk.ask(gate=OTHER)
        assert isinstance(answer, Wait)
        assert answer.why == "retry_after"

    def test_they_halve_the_rate_at_most_once_a_second(self, desk: Desk) -> None:
        desk.warm()
        held = [desk.ask() for _ in range(5)]
        for grant in held:
            desk.settle(grant, RATE_LIMITED, retry_after=0.1)
        assert desk.state()["rate"] == pytest.approx(0.95 / 2, abs=0.02)
        desk.move(2)
        desk.settle(desk.ask(), OVERLOADED)
        assert desk.state()["rate"] == pytest.approx(0.95 / 4, abs=0.03)

    def test_the_rate_never_falls_to_nothing(self, desk: Desk) -> None:
        desk.warm(3600)
        for grant in desk.grants(10):
            desk.settle(grant, OVERLOADED)
            desk.move(1.1)
        assert desk.state()["rate"] == pytest.approx(0.95 * 0.05, abs=0.001)
        desk.move(30)
        assert len(desk.grants()) >= 1

    def test_it_recovers_by_use_not_by_time(self, desk: Desk) -> None:
        desk.warm()
        desk.settle(desk.ask(), RATE_LIMITED, retry_after=0.1)
        halved = desk.state()["rate"]
        desk.move(600)
        assert desk.state()["rate"] == pytest.approx(halved, abs=0.001)
        for _ in range(12):
            desk.move(1)
            for grant in desk.grants():
                desk.settle(grant)
        assert desk.state()["rate"] == pytest.approx(0.95, abs=0.02)

    def test_without_retry_after_the_pause_grows(self, desk: Desk) -> None:
        pauses = []
        for _ in range(4):
            desk.settle(desk.ask(ticket="x"), RATE_LIMITED)
            pauses.append(desk.state()["closed"])
            desk.move(60)
        assert pauses == pytest.approx([1, 2, 4, 8], abs=0.1)
        desk.settle(desk.ask(ticket="x"))
        desk.settle(desk.ask(ticket="x"), RATE_LIMITED)
        assert desk.state()["closed"] == pytest.approx(1, abs=0.1)

    def test_what_was_saved_up_is_gone(self, desk: Desk) -> None:
        desk.warm(3600)
        desk.settle(desk.ask(), RATE_LIMITED, retry_after=0.0)
        assert desk.grants() == []


class TestBreaker:
    def fail(self, desk: Desk, calls: int, outcome: str = FAILED) -> None:
        for _ in range(calls):
            desk.settle(desk.ask(ticket="x"), outcome)

    @pytest.fixture(autouse=True)
    def wide(self, desk: Desk) -> None:
        desk.book.assumed = Quota(concurrency=1000)

    def test_it_opens_at_half_of_twenty_calls(self, desk: Desk) -> None:
        self.fail(desk, 10, "ok")
        self.fail(desk, 9)
        desk.settle(desk.ask(), FAILED)
        answer = desk.ask(ticket="x")
        assert isinstance(answer, Wait)
        assert answer.why == "breaker"
        assert answer.seconds == pytest.approx(5, abs=0.1)

    def test_fewer_calls_do_not_open_it(self, desk: Desk) -> None:
        self.fail(desk, 19)
        assert isinstance(desk.ask(), Grant)

    def test_failures_of_long_ago_do_not_count(self, desk: Desk) -> None:
        self.fail(desk, 15)
        desk.move(12)
        self.fail(desk, 15)
        assert isinstance(desk.ask(), Grant)

    def test_refusals_and_cancellations_do_not_count(self, desk: Desk) -> None:
        self.fail(desk, 40, NEUTRAL)
        assert isinstance(desk.ask(), Grant)

    def test_one_probe_decides(self, desk: Desk) -> None:
        self.fail(desk, 20)
        desk.move(5.1)
        probe = desk.ask(ticket="x")
        assert isinstance(probe, Grant)
        second = desk.ask(ticket="y")
        assert isinstance(second, Wait)
        assert second.why == "breaker"
        desk.settle(probe)
        assert isinstance(desk.ask(), Grant)
        assert not desk.state()["breaker"]

    def test_a_failed_probe_doubles_the_pause_up_to_two_minutes(self, desk: Desk) -> None:
        self.fail(desk, 20)
        pauses = [desk.state()["breaker"]]
        for _ in range(6):
            desk.move(pauses[-1] + 0.1)
            desk.settle(desk.ask(ticket="x"), FAILED)
            pauses.append(desk.state()["breaker"])
        assert pauses == pytest.approx([5, 10, 20, 40, 80, 120, 120], abs=0.2)

    def test_a_probe_that_says_nothing_lets_another_try(self, desk: Desk) -> None:
        self.fail(desk, 20)
        desk.move(5.1)
        desk.settle(desk.ask(ticket="x"), NEUTRAL)
        assert isinstance(desk.ask(ticket="x"), Grant)

    def test_a_probe_whose_worker_died_is_followed_by_another(self, desk: Desk) -> None:
        self.fail(desk, 20)
        desk.move(5.1)
        assert isinstance(desk.ask(ticket="x"), Grant)
        desk.move(61)
        assert isinstance(desk.ask(ticket="y"), Grant)


@dataclass
class Crowd:
    """Workers of some teams that ask, wait as long as they are told, call for a while and ask again."""

    desk: Desk
    workers: Mapping[str, int]
    weights: Mapping[str, float] = field(default_factory=dict)
    latency: float = 0.1
    sizes: Mapping[tuple[str, int], int] = field(default_factory=dict)
    """Input tokens of the calls of some workers, by team and number."""
    served_by: Counter[tuple[str, int]] = field(default_factory=Counter)
    asked: int = 0
    waits: dict[str, list[float]] = field(default_factory=dict)

    def run(self, seconds: float, *, tokens_in: int = 0) -> dict[str, int]:
        """Return how many calls each team made in so much (simulated) time."""
        served = dict.fromkeys(self.workers, 0)
        events: list[tuple[float, int, str, Any]] = []
        rng = random.Random(7)
        for team, count in self.workers.items():
            events += [(rng.random() * 0.05, number, team, None) for number in range(count)]
        now, since, calls = 0.0, {}, itertools.count()
        while events:
            events.sort(key=lambda event: event[:3])
            at, number, team, held = events.pop(0)
            if at > seconds:
                break
            self.desk.move(at - now)
            now = at
            if held is not None:
                self.desk.settle(held)
                events.append((at, number, team, None))
                continue
            since.setdefault((team, number), at)
            self.asked += 1
            answer = self.desk.ask(
                team,
                id=f"{team}{next(calls)}",
                ticket=f"{team}-{number}",
                weight=self.weights.get(team, 1.0),
                tokens_in=self.sizes.get((team, number), tokens_in),
            )
            if isinstance(answer, Grant):
                served[team] += 1
                self.served_by[team, number] += 1
                self.waits.setdefault(team, []).append(at - since.pop((team, number)))
                events.append((at + self.latency * rng.uniform(0.8, 1.2), number, team, answer))
            else:
                events.append((at + answer.seconds + 0.002, number, team, None))
        return served


def jain(values: list[float]) -> float:
    return sum(values) ** 2 / (len(values) * sum(value * value for value in values))


class TestFairness:
    def test_teams_with_unequal_demand_get_equal_shares(self, desk: Desk) -> None:
        crowd = Crowd(desk, {"big": 20, "middle": 3, "small": 1}, latency=0.1)
        served = crowd.run(60)
        assert jain([float(count) for count in served.values()]) >= 0.98
        assert sum(served.values()) >= 0.99 * 60 * 9.5

    def test_waiters_are_told_when_and_do_not_poll(self, desk: Desk) -> None:
        crowd = Crowd(desk, {"big": 40}, latency=0.1)
        served = sum(crowd.run(30).values())
        assert crowd.asked < 3 * served

    def test_what_a_team_does_not_want_others_get(self, desk: Desk) -> None:
        """One worker whose calls take a second can use one a second: the rest is not kept for it."""
        crowd = Crowd(desk, {"big": 30, "slow": 1}, latency=1.0)
        served = crowd.run(60)
        assert sum(served.values()) >= 0.98 * 60 * 9.5
        assert served["slow"] >= 0.85 * 60 / 1.12

    def test_weights(self, desk: Desk) -> None:
        crowd = Crowd(desk, {"gold": 20, "plain": 20}, weights={"gold": 3.0})
        served = crowd.run(60)
        assert served["gold"] / served["plain"] == pytest.approx(3, rel=0.1)

    def test_a_team_that_slept_has_saved_nothing_up(self, desk: Desk) -> None:
        Crowd(desk, {"big": 20}).run(30)
        served = Crowd(desk, {"big": 20, "late": 20}).run(10)
        assert jain([float(count) for count in served.values()]) >= 0.97

    def test_a_quiet_team_does_not_wait_behind_a_noisy_one(self, desk: Desk) -> None:
        both = Crowd(desk, {"noisy": 100, "quiet": 1})
        both.run(60)
        waits, theirs = sorted(both.waits["quiet"]), sorted(both.waits["noisy"])
        assert waits[int(len(waits) * 0.95)] < 0.6
        assert theirs[len(theirs) // 2] > 5

    def test_shares_count_the_dimension_that_binds(self, desk: Desk) -> None:
        """Input tokens bind: the team with small calls makes more of them."""
        desk.book.assumed = Quota(requests=6000, input_tokens=600_000)
        large = Crowd(desk, {"large": 10})
        served = large.run(20, tokens_in=5_000)
        assert served["large"] == pytest.approx(20 * 9_500 / 5_000, abs=4)

    @pytest.mark.parametrize("teams", [{"one": 11}, {"one": 1, "other": 10}])
    def test_a_large_call_is_not_overtaken_for_ever_by_small_ones(self, desk: Desk, teams: dict[str, int]) -> None:
        """It starts at half of the burst; what small ones leave is never so much unless they leave it room."""
        desk.book.assumed = Quota(input_tokens=60_000, concurrency=1000)
        desk.warm()
        crowd = Crowd(desk, teams, latency=0.05, sizes={("one", 0): 20_000}, weights={"other": 10.0})
        served = crowd.run(90, tokens_in=100)
        large = crowd.served_by["one", 0]
        assert large >= 2
        used = large * 20_000 + (sum(served.values()) - large) * 100
        assert used >= 0.97 * 90 * 950

    def test_nor_by_others_of_its_size_that_are_more_punctual(self, desk: Desk) -> None:
        """It comes two seconds late each time; somebody else comes just before it and finds plenty.

        Another team goes before it until it has had as much.
        """
        desk.book.assumed = Quota(input_tokens=60_000)
        desk.warm(3600)
        desk.settle(desk.ask(tokens_in=20_000, ticket="first"))
        for team, most in (("default", 0), ("other", 3)):
            overtaken = 0
            while isinstance(answer := desk.ask(tokens_in=20_000, ticket="late"), Wait):
                desk.move(answer.seconds + 1.9)
                overtaken += isinstance(desk.ask(team, tokens_in=20_000, ticket=f"fresh{overtaken}"), Grant)
                desk.move(0.1)
                assert overtaken <= most
            assert isinstance(answer, Grant)

    def test_nor_where_the_provider_has_less_left_than_we_think(self, desk: Desk) -> None:
        """Somebody else uses the account.  Small calls would keep what is left below what the large one needs."""
        desk.book.assumed = Quota(input_tokens=60_000)
        desk.warm(3600)
        left = 5_000.0

        def said() -> dict[str, Any]:
            return {"signals": {"input_tokens": Signal(limit=60_000.0, remaining=left, resets=5.0)}}

        desk.settle(desk.ask(tokens_in=10), **said())
        large = desk.ask(tokens_in=20_000, ticket="large")
        assert isinstance(large, Wait)
        due, small = large.seconds, 0
        for second in range(1, 61):
            desk.move(1)
            left += 1_000
            for number in range(2):
                answer = desk.ask(tokens_in=500, ticket=f"small{number}")
                if isinstance(answer, Grant):
                    left -= 500
                    small += 1
                    desk.settle(answer, **said())
            if second >= due:
                answer = desk.ask(tokens_in=20_000, ticket="large")
                if isinstance(answer, Grant):
                    break
                due = second + answer.seconds
        assert second < 45
        assert small >= 15  # they did not stand still for the first ten seconds

    def test_who_waited_and_has_gone_keeps_no_room(self, desk: Desk) -> None:
        desk.book.assumed = Quota(input_tokens=60_000)
        desk.warm(3600)
        desk.settle(desk.ask(tokens_in=20_000, ticket="first"))
        gone = desk.ask(tokens_in=20_000, ticket="gone")
        assert isinstance(gone, Wait)
        desk.move(gone.seconds + 6)
        assert len(desk.grants(tokens_in=1_000)) >= 2
        assert desk.state()["teams"].keys() <= {"default"}

    def test_teams_that_have_gone_leave_no_trace(self, desk: Desk) -> None:
        desk.warm(3600)
        for number in range(20):
            desk.settle(desk.ask(f"team{number}"))
        desk.move(60)
        for _ in range(40):
            desk.move(0.2)
            answer = desk.ask("last", ticket="x")
            if isinstance(answer, Grant):
                desk.settle(answer)
        assert desk.state()["waiting"] == 0

    def test_a_waiter_that_does_not_come_is_not_waited_for(self, desk: Desk) -> None:
        desk.grants()
        assert isinstance(desk.ask("gone"), Wait)
        desk.move(10)
        desk.ask("here")
        assert desk.state()["waiting"] <= 1
        assert len(desk.grants(team="here")) >= 20


class TestSnapshot:
    def test_it_shows_what_there_is(self, desk: Desk) -> None:
        held = desk.ask()
        desk.settle(held, signals={"requests": Signal(limit=1200.0, remaining=1000.0, resets=10.0)})
        state = desk.state()
        assert (state["target"], state["provider"], state["account"], state["model"]) == (
            "live",
            "openai",
            "acme",
            "gpt-5",
        )
        assert state["levels"]["requests"]["limit"] == 1200
        assert state["levels"]["requests"]["learned"] is True
        assert state["levels"]["requests"]["told"] == pytest.approx(1000, abs=10)
        assert (state["in_flight"], state["workers"], state["granted"]) == (0, 1, 1)

    def test_it_shows_who_waits(self, desk: Desk) -> None:
        desk.grants(team="early")
        for ticket in ("a", "b"):
            assert isinstance(desk.ask("late", ticket=ticket), Wait)
        assert desk.state()["teams"] == {"early": 1, "late": 2}
        assert desk.state()["waiting"] == 3


@pytest.mark.parametrize(
    "test",
    [
        TestBuckets.test_all_or_nothing,
        TestBuckets.test_settling_gives_back_what_was_not_used,
        TestBuckets.test_asking_again_with_the_same_call_costs_nothing,
        TestBuckets.test_lost_state_starts_with_one_second_again,
        TestBuckets.test_many_at_once_never_get_more_than_there_is,
        TestLeases.test_who_lives_keeps_it,
        TestHeaders.test_a_limit_that_a_person_has_set_is_kept_to,
        TestRefusals.test_without_headers_it_is_the_whole_account,
        TestFairness.test_nor_by_others_of_its_size_that_are_more_punctual,
        TestSnapshot.test_it_shows_what_there_is,
        TestSnapshot.test_it_shows_who_waits,
    ],
)
def test_postgresql_keeps_the_same_state(postgres_desk: Desk, test: Callable[[Any, Desk], None]) -> None:
    """The decisions are those of SQLite; only the store is another, and slower: what simulates minutes is left out."""
    test(test.__globals__[test.__qualname__.partition(".")[0]](), postgres_desk)
