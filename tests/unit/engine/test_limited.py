"""Calls behind the limiter: what is asked, what is waited for and where, what the limiter is told afterwards."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from gorgon_common.clock import SystemClock
from gorgon_common.costs.tokens import Ratio
from gorgon_common.costs.usage import CallRecord, Usage
from gorgon_common.engine.calls import leases
from gorgon_common.engine.calls.acquire import CROWD, SLICE, CallLimits
from gorgon_common.engine.calls.chain import Verdict
from gorgon_common.engine.calls.estimates import Estimates
from gorgon_common.engine.calls.sleep_slots import SleepSlots
from gorgon_common.engine.limits import Ask, Grant, LimitKey, Quota, Settlement
from gorgon_common.engine.ports import AgentCall, AgentReply, Message
from gorgon_common.errors import (
    Cancelled,
    Final,
    Internal,
    Malformed,
    OutputTooLarge,
    OverLimit,
    ProviderError,
    RateLimited,
    Retryable,
    Throttled,
    Unavailable,
)
from gorgon_common.ids import new_id
from gorgon_common.ratelimit.local import Memory, StoredLimiter
from gorgon_worker.settlements import settlement
from tests.support.calls import chain_to, conversation

GATE = LimitKey("live", "openai", "acme", "gpt-5")

HEADERS = {"x-ratelimit-limit-requests": "600", "x-ratelimit-remaining-requests": "599"}
CALL = AgentCall("gpt-5", (Message("user", "four words for you"),), max_tokens=100, timeout=30)


class Provider:
    """A provider that does as a test says: returns or raises what is next."""

    name = "openai"

    def __init__(self) -> None:
        self.next: list[Any] = []
        self.calls: list[AgentCall] = []
        self.during: Callable[[], Any] = lambda: None

    def call(self, call: AgentCall, cancelled: Callable[[], bool]) -> AgentReply:
        self.calls.append(call)
        self.during()
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
        self.limits = CallLimits(
            limiter=self.limiter,
            target="live",
            accounts={"openai": "acme"},
            weight=lambda _: 1.0,
            settlement=settlement,
            clock=self.time,
            sleep=self.time.sleep,
        )

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        return self.quota_now, Quota(concurrency=10**6)

    def call(self, call: AgentCall = CALL, cancelled: Callable[[], bool] = lambda: False) -> AgentReply:
        chain = chain_to(self.inner, _Free(), lambda _: None, clock=self.time, cancelled=cancelled, limits=self.limits)
        return chain.make(call, lambda _, reply: Verdict(reply)).reply

    def state(self) -> dict[str, Any]:
        return self.limiter.snapshot()[0]


@pytest.fixture
def desk() -> Iterator[Desk]:
    made = Desk(Quota(requests=600, tokens=600_000))
    yield made
    made.limits.close()


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
    assert caught.value.message == "openai gpt-5: no room under the rate limit for requests"
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


def test_a_repair_whose_conversation_is_stored_leaves_its_slot(desk: Desk) -> None:
    desk.quota_now = Quota(requests=6)
    desk.call()
    turns = (*CALL.messages, Message("assistant", "{}"), Message("user", "again"))
    with pytest.raises(Throttled):
        desk.call(replace(CALL, messages=turns, resumable=True))
    assert desk.time.slept == []
    assert desk.call(replace(CALL, messages=turns, resumable=True, patient=True)).text == "ok"


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
    with pytest.raises(OverLimit, match="it needs 100 tokens, but the limit is 50") as caught:
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
        desk.call(CALL, lambda: True)


@pytest.mark.parametrize(("beds", "seconds"), [(0, CROWD), (1, None)])
def test_who_finds_no_bed_waits_elsewhere_and_long_enough(desk: Desk, beds: int, seconds: float | None) -> None:
    """A wait of 0.05 s: slept where there is a bed; else the step leaves, for longer than it would keep its slot."""
    desk.limits.sleepers = SleepSlots(beds)
    for _ in range(9):
        assert isinstance(desk.limiter.acquire(Ask(new_id("other"), GATE)), Grant)
    if seconds is None:
        assert desk.call().text == "ok"
        assert sum(desk.time.slept) == pytest.approx(0.05, abs=0.01)
        with desk.limits.sleepers.one("team") as bed:
            assert bed  # it was given back
    else:
        with pytest.raises(Throttled) as caught:
            desk.call()
        assert caught.value.seconds == seconds
        assert caught.value.reason == "requests"
        assert desk.time.slept == []


def test_the_bed_of_a_cancelled_sleeper_is_free(desk: Desk) -> None:
    """It looks for a cancel before it sleeps and again after; a long sleep is cut into pieces."""
    desk.limits.sleepers = SleepSlots(1)
    desk.quota_now = Quota(requests=200)  # a second's worth is three calls, the next comes after 0.26 s
    for _ in range(3):
        assert isinstance(desk.limiter.acquire(Ask(new_id("other"), GATE)), Grant)
    said = iter([False, False, True])
    with pytest.raises(Cancelled):
        desk.call(CALL, lambda: next(said))
    assert desk.time.slept
    assert max(desk.time.slept) <= SLICE
    assert desk.inner.calls == []
    with desk.limits.sleepers.one("team") as bed:
        assert bed


def test_a_noisy_team_leaves_others_a_place_to_sleep() -> None:
    beds = SleepSlots(2, spare=1)
    with beds.one("noisy") as first, beds.one("noisy") as second, beds.one("noisy") as third:
        assert (first, second, third) == (True, True, False)
        with beds.one("quiet") as fourth, beds.one("other") as fifth:
            assert (fourth, fifth) == (True, False)
        with beds.one("other") as later:
            assert later


def test_a_patient_call_that_is_cancelled_while_it_waits_ends_soon(desk: Desk) -> None:
    desk.quota_now = Quota(requests=6)
    desk.call()
    began = desk.time.at
    with pytest.raises(Cancelled):
        desk.call(replace(CALL, patient=True), lambda: desk.time.at > began + 2)
    assert desk.time.at - began < 2 + 2 * SLICE
    assert desk.state()["in_flight"] == 0


def test_a_patient_call_needs_no_bed(desk: Desk) -> None:
    desk.limits.sleepers = SleepSlots(0)
    desk.quota_now = Quota(requests=6)
    desk.call()
    assert desk.call(replace(CALL, patient=True)).text == "ok"
    assert sum(desk.time.slept) == pytest.approx(10.5, rel=0.1)


def test_what_it_waited_is_taken_off_the_calls_own_time(desk: Desk) -> None:
    desk.quota_now = Quota(requests=6)
    desk.call()
    desk.call(replace(CALL, patient=True, timeout=30))
    assert desk.inner.calls[-1].timeout == pytest.approx(30 - sum(desk.time.slept), abs=0.01)


def test_a_call_keeps_its_lease_for_as_long_as_it_takes(desk: Desk) -> None:
    seen: list[int] = []

    def slow() -> None:
        for _ in range(4):
            desk.time.at += 40
            desk.limits.leases.extend()
            seen.append(desk.state()["in_flight"])

    desk.inner.during = slow
    desk.call()
    assert seen == [1, 1, 1, 1]
    assert desk.limits.leases._held == {}
    assert desk.state()["in_flight"] == 0


def test_without_that_it_would_be_lost(desk: Desk) -> None:
    seen: list[int] = []

    def slow() -> None:
        desk.time.at += 61
        seen.append(desk.state()["in_flight"])

    desk.inner.during = slow
    assert desk.call().text == "ok"
    assert seen == [0]


def test_leases_are_extended_by_a_thread_that_a_failure_does_not_end(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "BEAT", 0.001)
    times: list[int] = []
    enough = threading.Event()

    def extend(grants: Sequence[Grant]) -> int:
        times.append(len(grants))
        if len(times) < 3:
            raise Unavailable("away")
        enough.set()
        return 1

    monkeypatch.setattr(desk.limiter, "extend", extend)
    desk.inner.during = lambda: enough.wait(10)
    desk.call()
    assert times[:3] == [1, 1, 1]


def test_a_reply_is_kept_where_the_limiter_cannot_be_told(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(grant: Grant, settlement: Settlement) -> None:
        raise Unavailable("The database is away.")

    monkeypatch.setattr(desk.limiter, "settle", settle)
    assert desk.call().text == "ok"
    desk.inner.next = [failure(Final, kind="auth")]
    with pytest.raises(Final):
        desk.call()
    assert desk.limits.leases._held == {}


def test_429_without_a_time_is_a_pause_that_grows(desk: Desk) -> None:
    pauses = []
    for _ in range(3):
        desk.inner.next = [failure(RateLimited)]
        with pytest.raises(RateLimited):
            desk.call()
        pauses.append(desk.state()["closed"])
        desk.time.at += 60
    assert pauses == pytest.approx([1, 2, 4], abs=0.1)


@pytest.mark.parametrize(
    ("error", "settlement"),
    [
        (lambda: failure(RateLimited, retry_after=7.0), ("rate_limited", 7.0)),
        (lambda: failure(RateLimited), ("rate_limited", None)),
        (lambda: failure(Retryable, kind="overloaded"), ("overloaded", None)),
        (lambda: failure(Retryable, kind="overloaded", headers={"retry-after": "4"}), ("overloaded", 4.0)),
        (lambda: failure(Retryable, kind="server", headers={"retry-after": "4"}), ("failed", None)),
        (lambda: failure(Retryable, kind="timeout", usage=None), ("failed", None)),
        (lambda: failure(Retryable, kind="connection", usage=None), ("failed", None)),
        (lambda: failure(Final, kind="quota"), ("neutral", None)),
        (lambda: failure(Malformed), ("neutral", None)),
        (lambda: Cancelled(), ("neutral", None)),
        (lambda: OutputTooLarge(), ("neutral", None)),
        (lambda: RuntimeError("a bug"), ("neutral", None)),
    ],
)
def test_what_the_limiter_is_told_of_a_failure(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception], settlement: tuple[str, float | None]
) -> None:
    told: list[Settlement] = []
    settle = desk.limiter.settle

    def heard(grant: Grant, settlement: Settlement) -> None:
        told.append(settlement)
        settle(grant, settlement)

    monkeypatch.setattr(desk.limiter, "settle", heard)
    failed = error()
    desk.inner.next = [failed]
    with pytest.raises(Internal if isinstance(failed, RuntimeError) else type(failed)):
        desk.call()
    assert [(said.outcome, said.retry_after) for said in told] == [settlement]
    # Nobody knows what a broken call has used: all of what was reserved.
    unknown = getattr(failed, "usage", None) is None
    assert bool(told[0].used) is not unknown
    assert desk.state()["in_flight"] == 0


def test_the_next_call_is_announced_by_what_the_last_one_had(desk: Desk) -> None:
    """The provider counts ten times as many tokens: from the second call on so many are reserved."""
    desk.quota_now = Quota(input_tokens=60_000)
    plain, _ = Estimates().of("openai", CALL)
    desk.inner.next = [AgentReply("ok", Usage(round(plain * 5)), "gpt-5")]
    desk.call()
    desk.time.at += 3600
    before = desk.state()["levels"]["input_tokens"]["level"]
    levels: list[float] = []
    desk.inner.during = lambda: levels.append(desk.state()["levels"]["input_tokens"]["level"])
    desk.call()
    assert before - levels[0] == pytest.approx(plain * 5, abs=1)


def seen(ratio: float, calls: int = 100) -> Ratio:
    return Ratio(calls, calls * math.log(ratio), calls * math.log(ratio) ** 2)


def test_a_new_worker_begins_with_what_past_calls_have_shown() -> None:
    asked: list[int] = []

    def known() -> Mapping[tuple[str, str], Ratio]:
        asked.append(1)
        return {("openai", "gpt-5"): seen(2.0)}

    estimates = Estimates(known, unseen=0.8)
    assert asked == []
    plain, first = estimates.of("openai", CALL)
    assert first == pytest.approx(plain * 2, rel=0.05)
    # a model of the same family is taken to be alike, one that nothing is known of gets the default
    assert estimates.of("openai", replace(CALL, model="gpt-4o"))[1] > plain * 1.2
    other, unseen = estimates.of("anthropic", replace(CALL, model="claude-x"))
    assert unseen == round(other * 0.8)
    assert asked == [1]
    for _ in range(20):
        estimates.learn("openai", "gpt-5", plain, Usage(round(plain * 3)))
    assert estimates.of("openai", CALL)[1] == pytest.approx(plain * 3, rel=0.05)


def test_one_reply_does_not_overturn_what_many_have_shown() -> None:
    estimates = Estimates(lambda: {("openai", "gpt-5"): seen(2.0)})
    plain, _ = estimates.of("openai", CALL)
    estimates.learn("openai", "gpt-5", plain, Usage(round(plain * 4)))
    assert estimates.of("openai", CALL)[1] == pytest.approx(plain * 2.4, rel=0.05)


def test_without_the_database_calls_are_estimated_all_the_same() -> None:
    asked: list[int] = []

    def known() -> Mapping[tuple[str, str], Ratio]:
        asked.append(1)
        raise Unavailable("away")

    estimates = Estimates(known)
    plain, first = estimates.of("openai", CALL)
    assert first == round(plain)
    estimates.learn("openai", "gpt-5", plain, Usage(round(plain * 3)))
    assert estimates.of("openai", CALL)[1] == pytest.approx(plain * 3, abs=1)
    assert asked == [1]


def test_estimates_follow_what_the_provider_counts(desk: Desk) -> None:
    estimates = Estimates()
    plain, first = estimates.of("openai", CALL)
    assert first == pytest.approx(plain, abs=1)
    for _ in range(20):
        estimates.learn("openai", "gpt-5", plain, Usage(round(plain * 3)))
    assert estimates.of("openai", CALL)[1] == pytest.approx(plain * 3, rel=0.05)
    estimates.learn("openai", "gpt-5", plain, Usage())
    assert estimates.of("openai", CALL)[1] == pytest.approx(plain * 3, rel=0.05)


class _Free:
    version = "test"

    def price(
        self, provider: str, model: str, usage: Usage, *, service_tier: str | None = None, asked: str | None = None
    ) -> int | None:
        return 0


def _converse(desk: Desk, call: AgentCall, records: list[CallRecord]) -> Any:
    return conversation(desk.inner, call, _Free(), records.append, clock=desk.time, limits=desk.limits)
