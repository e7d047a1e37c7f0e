"""Periods, amounts and bounds."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_common.costs.budgets import Budget, dollars, window
from gorgon_common.costs.estimate import clamp, input_bound, least_output, worst_cost
from gorgon_common.costs.ledger import Kind, Posting, replay
from gorgon_common.costs.prices import GenaiPricer, make_pricer
from gorgon_common.costs.usage import Usage
from gorgon_common.errors import ConfigurationError

counts = st.integers(0, 300_000)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


@pytest.mark.parametrize(
    ("period", "zone", "now", "name", "starts", "ends"),
    [
        ("day", "UTC", "2026-11-22T23:59:59", "2026-11-22", "2026-11-22T00:00", "2026-11-23T00:00"),
        ("day", "Europe/Berlin", "2026-11-22T23:00:00", "2026-11-23", "2026-11-22T23:00", "2026-11-23T23:00"),
        ("day", "Europe/Berlin", "2026-03-29T10:00:00", "2026-03-29", "2026-03-28T23:00", "2026-03-29T22:00"),
        ("day", "Europe/Berlin", "2026-10-25T10:00:00", "2026-10-25", "2026-10-24T22:00", "2026-10-25T23:00"),
        ("day", "Pacific/Kiritimati", "2026-12-31T10:00:00", "2027-01-01", "2026-12-31T10:00", "2027-01-01T10:00"),
        ("month", "UTC", "2026-12-31T23:59:59", "2026-12", "2026-12-01T00:00", "2027-01-01T00:00"),
        ("month", "America/New_York", "2026-03-01T04:59:00", "2026-02", "2026-02-01T05:00", "2026-03-01T05:00"),
    ],
)
def test_a_period_is_that_of_its_timezone(period: str, zone: str, now: str, name: str, starts: str, ends: str) -> None:
    assert window(period, zone, at(now)) == (name, at(starts), at(ends))


@given(
    st.datetimes(at("2000-01-01").replace(tzinfo=None), at("2100-01-01").replace(tzinfo=None)),
    st.sampled_from(["day", "month"]),
)
@pytest.mark.parametrize("zone", ["UTC", "America/Sao_Paulo", "Australia/Lord_Howe", "Asia/Kathmandu", "Africa/Cairo"])
def test_periods_follow_each_other_without_a_gap(zone: str, moment: datetime, period: str) -> None:
    """Cairo and São Paulo have days without a midnight."""
    now = moment.replace(tzinfo=UTC)
    name, starts, ends = window(period, zone, now)
    assert starts is not None
    assert ends is not None
    assert starts <= now < ends
    after, follows, _ = window(period, zone, ends)
    assert follows == ends
    assert after > name


def test_accounts_tell_targets_periods_and_runs_apart() -> None:
    daily = Budget(7, "team", "blue", "day", "UTC", 5, None)
    each = Budget(8, "org", "", "run", "UTC", 5, None)
    now = at("2026-11-22T12:00:00")
    keys = {
        budget.account(target=target, root=root, now=moment).key
        for budget in (daily, each)
        for target in ("live", "sandbox")
        for root in (1, 2)
        for moment in (now, at("2026-11-23T12:00:00"))
    }
    assert len(keys) == 2 * 2 + 2 * 2
    assert daily.applies(team="blue", workflow="x")
    assert not daily.applies(team="red", workflow="blue")
    assert each.applies(team="red", workflow="x")


@pytest.mark.parametrize(
    ("micro", "shown"),
    [(0, "$0.00"), (1, "$0.000001"), (1_500_000, "$1.50"), (-250_000, "-$0.25"), (1_234_567_890_000, "$1,234,567.89")],
)
def test_dollars(micro: int, shown: str) -> None:
    assert dollars(micro) == shown


# Bounds


@settings(deadline=None)  # the first price loads the snapshot
@given(counts, counts, counts, counts, counts)
@pytest.mark.parametrize("model", ["openai:gpt-6.1-terra", "openai:gpt-6.2-sol", "anthropic:claude-sonnet-5-5"])
def test_no_usage_within_the_bound_costs_more(
    model: str, plain: int, read: int, written: int, hour: int, output: int
) -> None:
    """However the input is cached, long prompts with their higher prices included."""
    provider, _, name = model.partition(":")
    pricer = GenaiPricer()
    whole = plain + read + written + hour
    bound = worst_cost(lambda usage: pricer.price(provider, name, usage), whole, output)
    assert bound is not None
    cost = pricer.price(provider, name, Usage(whole, read, written, hour, output))
    assert cost is not None
    assert cost <= bound


@given(st.text(max_size=300), st.text(max_size=300))
def test_a_token_is_a_byte_at_least(prompt: str, system: str) -> None:
    assert input_bound([prompt], system=system) >= len((prompt + system).encode("utf-8", "replace")) + 6
    assert input_bound([prompt], schema={"description": prompt}) > input_bound([prompt])
    assert input_bound([prompt, system]) > input_bound([prompt])


def _price(usage: Usage) -> int:
    return usage.input_tokens + 5 * usage.output_tokens


@given(st.integers(0, 5000), st.integers(1, 5000), st.integers(0, 30_000), st.integers(0, 12_000))
def test_a_clamped_call_fits_and_could_not_be_longer(size: int, asked: int, usd: int, tokens: int) -> None:
    least = least_output(asked)
    got = clamp(_price, size, asked, least=least, usd=usd, tokens=tokens)

    def fits(output: int) -> bool:
        return size + 5 * output <= usd and size + output <= tokens

    if got is None:
        assert not fits(least)
    else:
        assert least <= got <= asked
        assert fits(got)
        assert got == asked or not fits(got + 1)


@pytest.mark.parametrize(("asked", "least"), [(100, 100), (1024, 1024), (1500, 1024), (4096, 2048), (1, 1)])
def test_how_short_a_reply_may_be_made(asked: int, least: int) -> None:
    assert least_output(asked) == least


def test_what_has_no_price_has_no_bound() -> None:
    assert worst_cost(lambda _: None, 1, 1) is None
    assert clamp(lambda _: None, 1, 10, least=1, usd=10**9, tokens=None) is None


# The ledger


def test_the_postings_are_the_balances() -> None:
    told = replay(
        [
            Posting(1, Kind.RESERVE, usd_reserved=10, token_reserved=5),
            Posting(2, Kind.RESERVE, usd_reserved=10),
            Posting(1, Kind.SETTLE, usd_reserved=-10, usd_spent=10, usd_overrun=2, token_reserved=-5, token_spent=3),
        ]
    )
    assert (told[1].usd_spent, told[1].usd_overrun, told[1].usd_reserved, told[1].token_spent) == (12, 2, 0, 3)
    assert told[2].usd_reserved == 10


# Prices of one's own


def test_the_operators_prices_go_first(tmp_path: Path) -> None:
    path = tmp_path / "prices.yaml"
    path.write_text(
        "- {provider: openai, model: gpt-6-luna, from: 2020-01-01, reason: x, prices: {input: 0, output: 0}}"
    )
    usage = Usage(input_tokens=1000, output_tokens=1000)
    own = make_pricer(path)
    assert own.price("openai", "gpt-6-luna", usage) == 0
    assert own.price("openai", "gpt-6.2-sol", usage) == make_pricer(None).price("openai", "gpt-6.2-sol", usage)
    assert own.version != make_pricer(None).version


@pytest.mark.parametrize("text", ["- {provider: openai}", "{", None])
def test_a_price_table_that_cannot_be_read(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "prices.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError):
        make_pricer(path)
