"""Calls behind the limiter: what is asked, what is waited for and where, what the limiter is told afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gorgon_common.clock import SystemClock
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.agent import converse
from gorgon_common.engine.limits import Gate, Quota
from gorgon_common.engine.ports import AgentCall, AgentReply, Message
from gorgon_common.errors import Cancelled, Final, OverLimit, ProviderError, RateLimited, Retryable, Throttled
from gorgon_common.ratelimit.stored import Memory, StoredLimiter
from gorgon_worker.limited import Estimates, LimitedProvider, LimitedProviders

HEADERS = {"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "599"}
CALL = AgentCall("gpt-5", (Message("user", "four words for you"),), max_tokens=100, timeout=30)


class Provider:
    """A provider that does as a test says: returns or raises what is next."""

    name = "openai"

    def __init__(self) -> None:
        self.next: list[Any] = []
        self.calls: list[AgentCall] = []

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        self.calls.append(call)
        found = self.next.pop(0) if self.next else AgentReply("ok", Usage(10, output_tokens=5), "gpt-5")
        if isinstance(found, Exception):
            raise found
        assert isinstance(found, AgentReply)
        return found

    def close(self) -> None:
        pass


class Time(SystemClock):
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.at = 5000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.at

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.at += seconds


class Desk:
    def __init__(self, quota: Quota) -> None:
        self.quota_now = quota
        self.time = Time()
        self.inner = Provider()
        self.limiter = StoredLimiter(Memory(lambda: self.time.at), self, worker="w")
        self.all = LimitedProviders(
            {"openai": self.inner}, self.limiter, target="live", accounts={"openai": "acme"}, weight=lambda _: 1.0
        )
        self.provider = LimitedProvider(
            self.inner,
            self.limiter,
            self.all._leases,
            target="live",
            account="acme",
            weight=lambda _: 1.0,
            estimates=Estimates(),
            clock=self.time,
            sleep=self.time.sleep,
        )

    def quota(self, gate: Gate) -> tuple[Quota, Quota]:
        return self.quota_now, Quota(concurrency=10**6)

    def call(self, call: AgentCall = CALL) -> AgentReply:
        return self.provider.call(call, lambda: False)

    def state(self) -> dict[str, Any]:
        return self.limiter.snapshot()[0]


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(Quota(requests=600, tokens=600_000))
    yield made
    made.all.close()


def failure(made: type[ProviderError], **fields: Any) -> ProviderError:
    usage, headers = fields.pop("usage", Usage()), fields.pop("headers", HEADERS)
    error = made("no", **fields)
    error.usage, error.headers = usage, headers
    return error


def test_what_was_really_used_is_settled(desk: Desk) -> None:
    desk.call()
    desk.time.at += 60
    desk.inner.next = [AgentReply("ok", Usage(1000, output_tokens=50), "gpt-5", headers=HEADERS)]
    desk.call()
    levels = desk.state()["levels"]
    assert levels["tokens"]["level"] == pytest.approx(30_000 - 1_050, abs=1)
    assert levels["requests"]["learned"]
    assert desk.state()["in_flight"] == 0


def test_a_short_wait_is_slept_in_place(desk: Desk) -> None:
    for _ in range(12):
        desk.call()
    assert desk.time.slept
    assert sum(desk.time.slept) < 0.5
    assert len(desk.inner.calls) == 12


def test_a_long_wait_gives_the_slot_back(desk: Desk) -> None:
    desk.quota_now = Quota(requests=6)
    desk.call()
    with pytest.raises(Throttled) as caught:
        desk.call()
    assert caught.value.reason == "requests"
    assert caught.value.seconds == pytest.approx(10 / 0.95, rel=0.1)
    assert caught.value.until == pytest.approx(desk.time.at + caught.value.seconds, abs=0.01)
    assert caught.value.message == "openai gpt-5: rate limit on requests"
    assert len(desk.inner.calls) == 1
    assert desk.time.slept == []


def test_a_wait_leaves_no_record_of_a_call(desk: Desk) -> None:
    desk.quota_now = Quota(requests=6)
    desk.call()
    records: list[CallRecord] = []
    with pytest.raises(Throttled):
        _converse(desk, CALL, records)
    assert records == []


def test_a_repair_waits_in_place_or_the_paid_reply_would_be_lost(desk: Desk) -> None:
    desk.quota_now = Quota(requests=6)
    desk.call()
    desk.time.at += 20
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    desk.inner.next = [AgentReply("{}", Usage(10, output_tokens=5), "gpt-5", data={})]
    desk.inner.next += [AgentReply('{"n": 1}', Usage(10, output_tokens=5), "gpt-5", data={"n": 1})]
    records: list[CallRecord] = []
    call = AgentCall("gpt-5", CALL.messages, schema=schema, timeout=60)
    assert _converse(desk, call, records).data == {"n": 1}
    assert [record.outcome for record in records] == ["invalid", "ok"]
    assert sum(desk.time.slept) > 5


def test_a_repair_that_is_refused_is_asked_again_in_place(desk: Desk) -> None:
    repair = AgentCall("gpt-5", (*CALL.messages, Message("assistant", "{}"), Message("user", "again")), timeout=60)
    desk.inner.next = [failure(RateLimited, retry_after=3.0)]
    assert desk.call(repair).text == "ok"
    assert sum(desk.time.slept) >= 3
    assert [call.timeout for call in desk.inner.calls] == pytest.approx([60, 57], abs=1)


def test_even_a_repair_does_not_wait_beyond_its_time(desk: Desk) -> None:
    desk.quota_now = Quota(requests=6)
    desk.call()
    with pytest.raises(Throttled):
        desk.call(AgentCall("gpt-5", CALL.messages, timeout=5, patient=True))


def test_what_never_fits_is_said_at_once_and_is_no_call(desk: Desk) -> None:
    desk.quota_now = Quota(tokens=50)
    records: list[CallRecord] = []
    with pytest.raises(OverLimit, match="it needs 100 tokens, and the limit is 50") as caught:
        _converse(desk, CALL, records)
    assert "gorgon limits set" in caught.value.hint
    assert (records, desk.inner.calls) == ([], [])


def test_a_refusal_closes_the_gate_for_everybody(desk: Desk) -> None:
    desk.inner.next = [failure(RateLimited, retry_after=7.0)]
    with pytest.raises(RateLimited):
        desk.call()
    with pytest.raises(Throttled) as caught:
        desk.call()
    assert caught.value.reason == "retry_after"
    assert caught.value.seconds == pytest.approx(7, abs=0.1)
    assert "asked for a pause" in caught.value.message


def test_529_with_a_pause(desk: Desk) -> None:
    desk.inner.next = [failure(Retryable, kind="overloaded", headers={**HEADERS, "retry-after": "4"})]
    with pytest.raises(Retryable):
        desk.call()
    assert desk.state()["closed"] == pytest.approx(4)
    assert desk.state()["rate"] == pytest.approx(0.475)


def test_no_credit_is_no_rate_limit(desk: Desk) -> None:
    desk.inner.next = [failure(Final, kind="quota")]
    with pytest.raises(Final):
        desk.call()
    assert (desk.state()["closed"], desk.state()["rate"]) == (0, 0.95)


def test_failures_open_the_breaker(desk: Desk) -> None:
    desk.quota_now = Quota()
    for _ in range(20):
        desk.inner.next = [failure(Retryable, kind="server")]
        with pytest.raises(Retryable):
            desk.call()
    with pytest.raises(Throttled) as caught:
        desk.call()
    assert caught.value.reason == "breaker"


def test_of_a_broken_connection_everything_that_was_reserved_counts(desk: Desk) -> None:
    desk.call()
    desk.time.at += 60
    desk.inner.next = [failure(Retryable, kind="connection", usage=None)]
    with pytest.raises(Retryable):
        desk.call(AgentCall("gpt-5", CALL.messages, max_tokens=2_000))
    assert desk.state()["levels"]["tokens"]["level"] == pytest.approx(28_000, abs=1)


def test_a_cancelled_call_gives_its_place_back_and_one_that_waits_ends(desk: Desk) -> None:
    desk.inner.next = [Cancelled()]
    with pytest.raises(Cancelled):
        desk.call()
    assert desk.state()["in_flight"] == 0
    with pytest.raises(Cancelled):
        desk.provider.call(CALL, lambda: True)


def test_estimates_follow_what_the_provider_counts(desk: Desk) -> None:
    estimates = Estimates()
    plain, first = estimates.of("openai", CALL)
    assert first == pytest.approx(plain, abs=1)
    for _ in range(20):
        estimates.learn("openai", "gpt-5", plain, Usage(round(plain * 3)))
    assert estimates.of("openai", CALL)[1] == pytest.approx(plain * 3, rel=0.05)
    estimates.learn("openai", "gpt-5", plain, Usage())
    assert estimates.of("openai", CALL)[1] == pytest.approx(plain * 3, rel=0.05)


def test_one_provider_is_made_for_each_name(desk: Desk) -> None:
    assert desk.all["openai"] is desk.all["openai"]
    assert list(desk.all) == ["openai"]
    with pytest.raises(KeyError):
        desk.all["nobody"]


class _Free:
    version = "test"

    def price(self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None) -> int | None:
        return 0


def _converse(desk: Desk, call: AgentCall, records: list[CallRecord]) -> Any:
    return converse(
        desk.provider,
        call,
        pricer=_Free(),
        provider_name="openai",
        cancelled=lambda: False,
        on_call=records.append,
        clock=desk.time,
    )
