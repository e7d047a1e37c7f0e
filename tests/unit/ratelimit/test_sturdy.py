"""A worker whose limiter cannot be reached: careful, never unlimited, and back as soon as it can be."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from gorgon_common.engine.limits import Ask, Grant, LimitKey, Quota, Settlement, Wait
from gorgon_common.errors import Unavailable
from gorgon_common.ratelimit.failover import UNSEEN_WORKERS, SturdyLimiter
from gorgon_common.ratelimit.redis import RedisLimiter
from tests.support.servers import dying_with_parent, free_port, redis_executable

GATE = LimitKey("live", "openai", "acme", "gpt-5")


class Book:
    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        return Quota(requests=600, tokens=60_000), Quota(concurrency=10**6)


class Server:
    """A Redis that can be killed and started again on its port."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.folder = folder
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        argv = [redis_executable(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir"]
        self.process = subprocess.Popen(dying_with_parent([*argv, str(self.folder)]), stdout=subprocess.DEVNULL)
        client = redis.Redis.from_url(self.url, retry=redis.retry.Retry(redis.backoff.ConstantBackoff(0.02), 500))
        client.ping()
        client.close()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.stop()


class Desk:
    def __init__(self, url: str, workers: int = 1) -> None:
        self.now = 1000.0
        self.count = 0
        self.shared = [RedisLimiter(url, Book(), worker=f"w{number}") for number in range(workers)]
        self.limiter = SturdyLimiter(self.shared[0], Book(), worker="w0", clock=lambda: self.now)

    def ask(self, tokens: int = 10) -> object:
        self.count += 1
        return self.limiter.acquire(Ask(f"c{self.count}", GATE, tokens_in=tokens, ticket="t"))

    def grants(self) -> list[Grant]:
        found = []
        while isinstance(answer := self.ask(), Grant):
            found.append(answer)
        return found

    def close(self) -> None:
        for shared in self.shared:
            shared.close()


def test_for_a_second_everybody_waits_then_each_goes_on_alone(server: Server) -> None:
    desk = Desk(server.url, workers=4)
    for other in desk.shared[1:]:
        other.acquire(Ask(f"x{id(other)}", GATE))
    assert isinstance(desk.ask(), Grant)
    server.stop()
    answer = desk.ask()
    assert isinstance(answer, Wait)
    assert answer.why == "unreachable"
    assert 0.9 <= answer.seconds <= 1.0
    desk.now += 1.01
    alone = desk.grants()
    # four workers: an eighth of 600 a minute each, and one second's worth of it (at least a call) to begin with
    assert 1 <= len(alone) <= 2
    assert all(grant.local for grant in alone)
    desk.close()


def test_without_knowing_how_many_there_are_it_takes_many(server: Server) -> None:
    server.stop()
    desk = Desk(server.url)
    desk.ask()
    desk.now += 1.01
    assert desk.limiter._scale(GATE) == 1 / (2 * UNSEEN_WORKERS)
    assert len(desk.grants()) <= 2
    desk.close()


def test_a_call_that_fits_the_whole_limit_is_never_refused_for_good(server: Server) -> None:
    server.stop()
    desk = Desk(server.url)
    desk.ask()
    desk.now += 1.01
    assert isinstance(desk.ask(tokens=50_000), Grant | Wait)
    desk.close()


def test_it_comes_back_by_itself_and_late_settlements_are_harmless(server: Server) -> None:
    desk = Desk(server.url)
    before = desk.ask()
    assert isinstance(before, Grant)
    server.stop()
    desk.ask()
    desk.now += 1.01
    alone = desk.ask()
    assert isinstance(alone, Grant)
    assert alone.local
    desk.limiter.settle(before, Settlement())
    server.start()
    assert not isinstance(desk.ask(), Grant) or desk.limiter._down is not None  # it asks once a second only
    desk.now += 1.01
    answer = desk.ask()
    assert isinstance(answer, Grant)
    assert not answer.local
    desk.limiter.settle(alone, Settlement())
    assert desk.limiter.extend([answer, alone]) == 1
    assert desk.limiter.snapshot()[0]["in_flight"] == 1
    desk.close()


def test_a_redis_that_does_not_answer_is_as_good_as_away_and_charges_nothing_twice(server: Server) -> None:
    """It is stopped, not killed: connections stay, and what was asked is done as soon as it goes on."""
    desk = Desk(server.url)
    held = desk.ask()
    assert isinstance(held, Grant)
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        began = time.monotonic()
        unsure = Ask("unsure", GATE, ticket="t")
        answer = desk.limiter.acquire(unsure)
        assert 0.9 <= time.monotonic() - began < 3
        assert isinstance(answer, Wait)
        assert answer.why == "unreachable"
        began = time.monotonic()
        desk.ask()
        desk.limiter.settle(held, Settlement())
        assert time.monotonic() - began < 0.5  # nobody else waits for it: once a second one call looks
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    desk.now += 1.01
    answer = desk.limiter.acquire(unsure)
    assert isinstance(answer, Grant)
    assert not answer.local
    # what was stopped has been granted, once; `held` was settled while nobody listened and goes by its lease
    assert desk.limiter.snapshot()[0]["in_flight"] == 2
    desk.close()


class Fitful(RedisLimiter):
    """The shared limiter, in reach for `up` seconds out of `up + down`."""

    def __init__(self, url: str, worker: str, now: list[float], up: float, down: float) -> None:
        super().__init__(url, Book(), worker=worker)
        self.began = time.time()
        self.now, self.up, self.down = now, up, down

    def _decide(self, batches: Any) -> Any:
        if self.now[0] % (self.up + self.down) >= self.up:
            raise Unavailable("too slow")
        self.clock_offset = self.began + self.now[0] - time.time()
        return super()._decide(batches)


def most_in_a_minute(url: str, up: float, down: float, *, honest: bool = True) -> int:
    """Let four workers of eight threads call as much as they may, for 100 (simulated) seconds."""
    now = [0.0]
    workers = []
    for number in range(4):
        shared = Fitful(url, f"w{number}", now, up, down)
        made = SturdyLimiter(
            shared, Book(), worker=f"w{number}", clock=lambda: now[0], wall=lambda: 1_700_000_000 + now[0]
        )
        if not honest:
            nothing: Callable[..., None] = lambda *_: None  # noqa: E731
            shared.debit = made._alone.drain = nothing  # type: ignore[method-assign]
        workers.append(made)
    events: list[tuple[float, int, int, Grant | None]] = [
        (number / 10 + thread / 100, number, thread, None) for number in range(4) for thread in range(8)
    ]
    calls, let_in = itertools.count(), []
    while events:
        events.sort(key=lambda event: event[:3])
        at, number, thread, held = events.pop(0)
        now[0] = at
        if at > 100:
            break
        if held is not None:
            workers[number].settle(held, Settlement())
            events.append((at, number, thread, None))
            continue
        answer = workers[number].acquire(Ask(f"c{next(calls)}", GATE, ticket=f"{number}-{thread}"))
        if isinstance(answer, Grant):
            let_in.append(at)
            events.append((at + 0.2, number, thread, answer))
        else:
            assert isinstance(answer, Wait)
            events.append((at + answer.seconds + 0.002, number, thread, None))
    for worker in workers:
        worker.close()
    return max(sum(start <= at < start + 60 for at in let_in) for start in range(10, 40))


@pytest.mark.parametrize(("up", "down"), [(3.0, 3.0), (5.0, 3.0)])
def test_a_redis_that_comes_and_goes_lets_nobody_above_the_limit(server: Server, up: float, down: float) -> None:
    assert 300 <= most_in_a_minute(server.url, up, down) <= 600


def test_it_would_if_either_side_saved_up_what_the_other_uses(server: Server) -> None:
    assert most_in_a_minute(server.url, 3.0, 3.0, honest=False) > 660
