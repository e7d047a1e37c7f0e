"""Which limits hold for a gate."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gorgon_common.engine.limits import LimitKey, Quota
from gorgon_common.errors import ConfigurationError, Unavailable
from gorgon_common.operations.providers import PROVIDERS
from gorgon_common.ratelimit.quotas import MOST, OwnLimits, QuotaBook, Rule, checked, read_limits

GPT = LimitKey("live", "openai", "a", "gpt-5")
NOTHING = OwnLimits({}, (), {})


def own(tmp_path: Path, text: str) -> OwnLimits:
    path = tmp_path / "limits.yaml"
    path.write_text(text)
    return read_limits(path)


def test_tier_one_is_assumed_and_nothing_is_a_ceiling() -> None:
    assumed, ceiling = QuotaBook(NOTHING).quota(GPT)
    assert (assumed.limits["requests"], assumed.limits["tokens"]) == (500, 500_000)
    assert ceiling == Quota(concurrency=MOST)


def test_a_tier_and_rules_of_ones_own(tmp_path: Path) -> None:
    mine = own(
        tmp_path,
        """
openai: {tier: 2, models: {"gpt-5*": {requests: 100, concurrency: 5}, "*": {tokens: 7}}}
weights: {research: 2}
""",
    )
    book = QuotaBook(mine)
    assumed, ceiling = book.quota(GPT)
    assert (assumed.limits["requests"], assumed.limits["tokens"], assumed.concurrency) == (5000, 1_000_000, 5)
    assert (ceiling.limits["requests"], ceiling.limits["tokens"], ceiling.concurrency) == (100, 7, 5)
    assert (book.weight("research"), book.weight("other")) == (2.0, 1.0)


def test_what_was_set_last_wins_and_is_seen_soon() -> None:
    stored: list[Rule] = []
    now = [0.0]
    book = QuotaBook(
        OwnLimits({}, (Rule("openai", "*", {"requests": 50.0, "tokens": 9.0}),), {}),
        stored=lambda: stored,
        clock=lambda: now[0],
    )
    assert book.quota(GPT)[1].limits["requests"] == 50
    stored[:] = [Rule("openai", "gpt-5", {"requests": 10.0}), Rule("openai", "*", {"requests": 20.0})]
    now[0] += 4.9
    assert book.quota(GPT)[1].limits["requests"] == 50
    now[0] += 0.2
    assert (book.quota(GPT)[1].limits["requests"], book.quota(GPT)[1].limits["tokens"]) == (10, 9)


def test_without_the_database_what_was_known_holds() -> None:
    now, away = [0.0], [False]

    def stored() -> list[Rule]:
        if away[0]:
            raise Unavailable
        return [Rule("*", "*", {"requests": 3.0})]

    book = QuotaBook(NOTHING, stored=stored, clock=lambda: now[0])
    assert book.quota(GPT)[1].limits["requests"] == 3
    now[0], away[0] = 100.0, True
    assert book.quota(GPT)[1].limits["requests"] == 3


def test_nobody_goes_on_before_what_was_set_is_known() -> None:
    """Calls of one process begin at the same moment: none of them may miss a limit that somebody has set."""
    reading, go_on = threading.Event(), threading.Event()

    def stored() -> list[Rule]:
        reading.set()
        assert go_on.wait(10)
        return [Rule("*", "*", {"requests": 3.0})]

    book = QuotaBook(NOTHING, stored=stored)
    with ThreadPoolExecutor(4) as pool:
        quotas = [pool.submit(book.quota, GPT) for _ in range(4)]
        assert reading.wait(10)
        assert not any(quota.done() for quota in quotas)
        go_on.set()
        assert [quota.result(10)[1].limits["requests"] for quota in quotas] == [3, 3, 3, 3]


def test_later_on_nobody_waits_for_it() -> None:
    now, slow, go_on = [0.0], threading.Event(), threading.Event()

    def stored() -> list[Rule]:
        if now[0] > 0:
            slow.set()
            assert go_on.wait(10)
        return [Rule("*", "*", {"requests": 3.0 + now[0]})]

    book = QuotaBook(NOTHING, stored=stored, clock=lambda: now[0])
    assert book.quota(GPT)[1].limits["requests"] == 3
    now[0] = 10.0
    with ThreadPoolExecutor(1) as pool:
        fresh = pool.submit(book.quota, GPT)
        assert slow.wait(10)
        assert book.quota(GPT)[1].limits["requests"] == 3
        go_on.set()
        assert fresh.result(10)[1].limits["requests"] == 13
    assert book.quota(GPT)[1].limits["requests"] == 13


def test_a_database_that_is_away_at_first_is_asked_again_at_once() -> None:
    away = [True]

    def stored() -> list[Rule]:
        if away[0]:
            raise Unavailable
        return [Rule("*", "*", {"requests": 3.0})]

    book = QuotaBook(NOTHING, stored=stored, clock=lambda: 1.0)
    assert "requests" not in book.quota(GPT)[1].limits
    away[0] = False
    assert book.quota(GPT)[1].limits["requests"] == 3


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True, "5"])
def test_a_limit_is_a_number_above_0(value: object) -> None:
    with pytest.raises(ValueError, match="above 0"):
        checked("openai", {"requests": value})


def test_there_is_no_half_call_in_flight() -> None:
    assert checked("openai", {"concurrency": 2.0, "requests": 0.5}) == {"concurrency": 2.0, "requests": 0.5}
    with pytest.raises(ValueError, match=r"concurrency is 2\.5; it has to be a whole number"):
        checked("openai", {"concurrency": 2.5})


def test_a_compatible_server_has_no_tiers() -> None:
    assumed, _ = QuotaBook(NOTHING, official=lambda _: False).quota(GPT)
    assert assumed.limits == {}


def test_the_sandbox_has_its_own() -> None:
    assumed, _ = QuotaBook(NOTHING).quota(LimitKey("sandbox", "anthropic", "sandbox", "claude-sonnet-5"))
    assert (assumed.limits["requests"], assumed.limits["input_tokens"], assumed.concurrency) == (
        600_000,
        400_000_000,
        1000,
    )


def test_every_tier_of_the_table_can_be_read() -> None:
    for provider, descriptor in PROVIDERS.items():
        for tier in descriptor.tiers:
            book = QuotaBook(OwnLimits({provider: tier}, (), {}))
            assumed, _ = book.quota(LimitKey("live", provider, "a", "anything"))
            assert assumed.limits.keys() <= {dimension.name for dimension in descriptor.dimensions}
            assert assumed.limits


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("openai: {tier: 9}", "openai has no tier 9; it has 1, 2, 3, 4, 5"),
        ("openai: {models: {'*': {request: 5}}}", "there is no limit 'request'"),
        ("openai: {models: {'*': {requests: 0}}}", "requests is 0; it has to be a number above 0"),
        ("openai: {models: {'*': {requests: many}}}", "requests is 'many'"),
        ("openai: {teir: 2}", "openai has no teir"),
        ("weights: {research: 0}", "weight has to be a number above 0"),
        ("weights: {research: .inf}", "`.inf` is not a number that can be used"),
        ("openai: {tier: 1}\nopenai: {tier: 2}", "`openai` is written twice"),
        ("openai: [1", "limits.yaml:1:9: a list opened with"),
        ("just a text", "limits.yaml"),
    ],
)
def test_what_is_wrong_in_a_file_is_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        own(tmp_path, text)


def test_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_limits(tmp_path / "none.yaml")
