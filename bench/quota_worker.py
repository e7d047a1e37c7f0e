"""One of the four worker processes of `bench.limits`: `python -m bench.quota_worker SPEC.json NUMBER OUT.json`.

Drives a rate-limiting method and a simulated provider over plain HTTP, so that little CPU is spent on anything else.
The methods: `gorgon` (the limiter), `sdk` (the provider's SDK with its own retries), `backoff` (a semaphore with
exponential backoff), `full` (a plain bucket in Redis that starts full).
"""

from __future__ import annotations

import http.client
import itertools
import json
import random
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import redis

from gorgon_common import lazy
from gorgon_common.costs.usage import Usage
from gorgon_common.engine.limits import FAILED, OK, RATE_LIMITED, Ask, Grant, LimitKey, Quota, Settlement, Wait
from gorgon_common.ratelimit.costs import used
from gorgon_common.ratelimit.failover import SturdyLimiter
from gorgon_common.ratelimit.headers import signals
from gorgon_common.ratelimit.redis import RedisLimiter

_FULL = """
local t = redis.call('TIME'); local now = t[1] * 1000 + t[2] / 1000
local has = tonumber(redis.call('HGET', KEYS[1], 'l') or ARGV[1])
local at = tonumber(redis.call('HGET', KEYS[1], 'a') or now)
has = math.min(tonumber(ARGV[1]), has + (now - at) * ARGV[1] / 60000)
local ok = has >= 1
if ok then has = has - 1 end
redis.call('HSET', KEYS[1], 'l', has, 'a', now)
return ok and 1 or 0
"""


@dataclass
class Scenario:
    """A scenario to drive; see `bench.limits.Case`."""

    name: str
    way: str
    provider: str
    url: str
    redis_url: str
    account: str
    quota: dict[str, Any]
    limit: float
    threads: dict[str, int]
    prompt: int
    max_tokens: int
    begins: float
    ends: float
    seed: int


@dataclass
class Book:
    """The configured quota."""

    assumed: Quota

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        return self.assumed, Quota(concurrency=10**6)


@dataclass
class Side:
    """The part of a scenario in this process."""

    scenario: Scenario
    number: int
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    """(team, ready, granted, sent, answered, status, retry_after, denials) of each call."""
    given_up: int = 0
    limiter: Any = None
    numbers: Any = field(default_factory=itertools.count)

    def start(self) -> list[threading.Thread]:
        case = self.scenario
        if case.way == "gorgon":
            book = Book(Quota(**case.quota))
            shared = RedisLimiter(case.redis_url, book, worker=f"w{self.number}")
            self.limiter = SturdyLimiter(shared, book, worker=f"w{self.number}")
        ways: dict[str, Callable[[str, int], None]] = {
            "gorgon": self.gorgon,
            "sdk": self.sdk,
            "backoff": self.backoff,
            "full": self.full,
        }
        threads = []
        for team, count in case.threads.items():
            share = count // 4 + (1 if self.number < count % 4 else 0)
            threads += [
                threading.Thread(target=self.guarded, args=(ways[case.way], team, place), daemon=True)
                for place in range(share)
            ]
        for thread in threads:
            thread.start()
        return threads

    def guarded(self, way: Callable[[str, int], None], team: str, place: int) -> None:
        time.sleep(max(0.0, self.scenario.begins - time.time()))
        way(team, place)

    def over(self) -> bool:
        return time.time() >= self.scenario.ends

    # The methods

    def gorgon(self, team: str, place: int) -> None:
        case = self.scenario
        line = Line(case)
        model = line.model
        gate = LimitKey("sandbox", case.provider, case.account, model)
        denials = 0
        ready = time.time()
        tokens = case.prompt // 4 + 10
        name = ""
        while not self.over():
            name = name or f"{self.number}-{place}-{team}-{next(self.numbers)}"
            ask = Ask(
                name,
                gate,
                tokens_in=tokens,
                tokens_out=case.max_tokens,
                team=team,
                ticket=f"{self.number}-{place}",
            )
            answer = self.limiter.acquire(ask)
            if isinstance(answer, Wait):
                denials += 1
                time.sleep(min(answer.seconds, max(0.0, case.ends - time.time())))
                continue
            assert isinstance(answer, Grant), answer
            name = ""
            sent = time.time()
            status, headers, usage = line.call()
            answered = time.time()
            after = retry_after(headers) if status == 429 else None
            outcome = {200: OK, 429: RATE_LIMITED}.get(status, FAILED)
            spent = used(case.provider, usage) if usage is not None else {}
            self.limiter.settle(answer, Settlement(outcome, spent, signals(case.provider, headers), after))
            if usage is not None and usage.input_tokens:
                tokens = usage.input_tokens
            self.calls.append((team, ready, answer.at, sent, answered, status, after, denials))
            denials = 0
            if status == 200:
                ready = time.time()
            elif status != 429:
                self.given_up += 1  # a call that got a 429 is made again; no other status is expected

    def sdk(self, team: str, place: int) -> None:
        case = self.scenario
        module = lazy.load("openai")
        client = module.OpenAI(base_url=f"{case.url}/v1", api_key=case.account, max_retries=50)
        line = Line(case)
        while not self.over():
            ready = time.time()
            try:
                client.responses.create(
                    model=line.model, input=line.text(), max_output_tokens=case.max_tokens, timeout=60
                )
            except module.APIError:
                self.given_up += 1
            else:
                self.calls.append((team, ready, ready, ready, time.time(), 200, None, 0))

    def backoff(self, team: str, place: int) -> None:
        line = Line(self.scenario)
        chance = random.Random(self.scenario.seed + self.number * 1000 + place)
        while not self.over():
            ready, tries = time.time(), 0
            while not self.over():
                sent = time.time()
                status, headers, _ = line.call()
                after = retry_after(headers) if status == 429 else None
                self.calls.append((team, ready, sent, sent, time.time(), status, after, 0))
                if status == 200:
                    break
                time.sleep(min(60.0, chance.random() * 2.0**tries))
                tries += 1

    def full(self, team: str, place: int) -> None:
        case = self.scenario
        line = Line(case)
        client = redis.Redis.from_url(case.redis_url)
        script = client.register_script(_FULL)
        while not self.over():
            if not script(keys=["full:" + case.account], args=[case.limit]):
                time.sleep(0.05)
                continue
            sent = time.time()
            status, _, _ = line.call()
            self.calls.append((team, sent, sent, sent, time.time(), status, None, 0))


class Line:
    """One keep-alive connection to the simulated provider."""

    def __init__(self, case: Scenario) -> None:
        self.case = case
        self.model = "claude-sonnet-5" if case.provider == "anthropic" else "gpt-5-mini"
        self.path = "/v1/messages" if case.provider == "anthropic" else "/v1/responses"
        self.headers = {"content-type": "application/json", "authorization": f"Bearer {case.account}"}
        if case.provider == "anthropic":
            self.headers["anthropic-version"] = "2026-10-21"
        self.connection = http.client.HTTPConnection(urlsplit(case.url).netloc, timeout=30)
        self.count = 0

    def text(self) -> str:
        self.count += 1
        return f"{self.count} of {self.case.name} " + "word " * (self.case.prompt // 5)

    def call(self) -> tuple[int, dict[str, str], Usage | None]:
        """Return (status, headers, usage)."""
        body: dict[str, Any] = {"model": self.model}
        if self.case.provider == "anthropic":
            body |= {"max_tokens": self.case.max_tokens, "messages": [{"role": "user", "content": self.text()}]}
        else:
            body |= {"input": self.text(), "max_output_tokens": self.case.max_tokens}
        for _ in range(2):
            try:
                self.connection.request("POST", self.path, json.dumps(body), self.headers)
                reply = self.connection.getresponse()
                data = reply.read()
                break
            except (http.client.HTTPException, OSError):
                self.connection.close()
        else:
            return 599, {}, None
        headers = {name.lower(): value for name, value in reply.getheaders()}
        if reply.status != 200:
            return reply.status, headers, Usage() if reply.status == 429 else None
        said = json.loads(data)["usage"]
        return 200, headers, Usage(input_tokens=said["input_tokens"], output_tokens=said["output_tokens"])


def retry_after(headers: dict[str, str]) -> float | None:
    for name, scale in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        if name in headers:
            return float(headers[name]) * scale
    return None


def main() -> None:
    """Drive every scenario of the spec until the last one ends; write the results."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    number = int(sys.argv[2])
    sides = [Side(Scenario(**case), number) for case in spec]
    threads = [thread for side in sides for thread in side.start()]
    ends = max(side.scenario.ends for side in sides)
    for thread in threads:
        thread.join(max(0.1, ends + 20 - time.time()))
    told = [{"name": side.scenario.name, "calls": side.calls, "given_up": side.given_up} for side in sides]
    Path(sys.argv[3]).write_text(json.dumps(told))


if __name__ == "__main__":
    main()
