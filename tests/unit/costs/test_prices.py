"""Prices against figures worked out by hand from the providers' price lists."""

from __future__ import annotations

import random
from datetime import UTC, date, datetime
from decimal import Decimal

import pytest

from gorgon_common.costs.prices import GenaiPricer, Override, _micros, read_overrides
from gorgon_common.costs.usage import Usage
from gorgon_common.errors import ConfigurationError


class FixedClock:
    """A clock that stands still."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return 0.0


NOVEMBER = FixedClock(datetime(2026, 11, 22, 12, tzinfo=UTC))
PRICER = GenaiPricer(clock=NOVEMBER)

CASES = [
    # gpt-6-luna: $0.10 in, $0.01 cached, $0.50 out
    ("openai", "gpt-6-luna", Usage(input_tokens=1000, cache_read_tokens=200, output_tokens=100), None, 80 + 2 + 50),
    # half of it
    ("openai", "gpt-6-luna", Usage(input_tokens=1000, cache_read_tokens=200, output_tokens=100), "flex", 66),
    ("openai", "gpt-6-luna", Usage(input_tokens=1000, cache_read_tokens=200, output_tokens=100), "batch", 66),
    # twice
    ("openai", "gpt-6-luna", Usage(input_tokens=1000, cache_read_tokens=200, output_tokens=100), "priority", 264),
    ("openai", "gpt-6-luna", Usage(input_tokens=1000, cache_read_tokens=200, output_tokens=100), "default", 132),
    # gpt-6.1-sol: $2 in, $0.10 cached, $2.50 written, $10 out; reasoning is part of the output, at its price
    (
        "openai",
        "gpt-6.1-sol",
        Usage(
            input_tokens=10_000,
            cache_read_tokens=4_000,
            cache_write_5m_tokens=1_000,
            output_tokens=2_000,
            reasoning_tokens=1_500,
        ),
        None,
        5_000 * 2 + 400 + 2_500 + 20_000,
    ),
    # over 272,000 input tokens the whole request costs $4 in, $15 out
    ("openai", "gpt-6.1-sol", Usage(input_tokens=300_000, output_tokens=1_000), None, 1_200_000 + 15_000),
    ("openai", "gpt-6.1-sol", Usage(input_tokens=272_000, output_tokens=1_000), None, 544_000 + 10_000),
    # gpt-4.1: $2 in, no price for cache writes: they are plain input
    ("openai", "gpt-4.1", Usage(input_tokens=1_000, cache_write_5m_tokens=500, output_tokens=0), None, 2_000),
    # claude-opus-5-5: $4 in, $0.20 read, $5 written for 5 minutes, $8 for an hour, $20 out
    (
        "anthropic",
        "claude-opus-5-5",
        Usage(
            input_tokens=1_000,
            cache_read_tokens=200,
            cache_write_5m_tokens=100,
            cache_write_1h_tokens=50,
            output_tokens=100,
        ),
        "standard",
        650 * 4 + 40 + 500 + 400 + 2_000,
    ),
    ("anthropic", "claude-opus-5-5", Usage(input_tokens=1_000, output_tokens=100), "batch", 2_000 + 1_000),
    # claude-sonnet-5-5: $2 in, $10 out
    ("anthropic", "claude-sonnet-5-5", Usage(input_tokens=1_234, output_tokens=567), None, 2_468 + 5_670),
    # the names of snapshots
    ("anthropic", "claude-haiku-4-5-20251001", Usage(input_tokens=1_000, output_tokens=1_000), None, 1_000 + 5_000),
    # ours: gpt-6.2-sol, $2 in, $0.10 cached, $10 out, twice and half as much again over 272,000
    (
        "openai",
        "gpt-6.2-sol",
        Usage(input_tokens=1_000, cache_read_tokens=500, output_tokens=10),
        None,
        1_000 + 50 + 100,
    ),
    ("openai", "gpt-6.2-sol", Usage(input_tokens=272_001, output_tokens=100), None, 272_001 * 4 + 1_500),
    ("openai", "gpt-6.2-astra", Usage(input_tokens=1_000, output_tokens=100), None, 8_000 + 4_000),
]


@pytest.mark.parametrize(("provider", "model", "usage", "tier", "micros"), CASES)
def test_price(provider: str, model: str, usage: Usage, tier: str | None, micros: int) -> None:
    assert PRICER.price(provider, model, usage, service_tier=tier) == micros


@pytest.mark.parametrize(
    ("provider", "model", "tier"),
    [
        ("openai", "llama-4-of-ours", None),
        ("anthropic", "gpt-6-luna", None),
        ("nobody", "gpt-6-luna", None),
        ("openai", "gpt-5.4-nano", "priority"),  # sold in default, flex and batch
        ("openai", "gpt-6-luna", "scale"),
        ("openai", "gpt-6.2-sol", "flex"),
        ("anthropic", "claude-opus-5-5", "priority"),
    ],
)
def test_unknown_is_none(provider: str, model: str, tier: str | None) -> None:
    assert PRICER.price(provider, model, Usage(input_tokens=10, output_tokens=10), service_tier=tier) is None


def test_rounded_half_up_and_never_0() -> None:
    # gpt-6-luna, input: a tenth of a micro-dollar a token
    assert [PRICER.price("openai", "gpt-6-luna", Usage(input_tokens=count)) for count in (0, 1, 4, 14, 15, 25)] == [
        0, 1, 1, 1, 2, 3,
    ]  # fmt: skip


def test_counts_that_contradict_each_other_are_charged_by_their_parts() -> None:
    usage = Usage(input_tokens=10, cache_read_tokens=100_000)
    assert PRICER.price("anthropic", "claude-opus-5-5", usage) == 20_000


TABLE = """
- {provider: openai, model: m, from: 2026-01-01, until: 2026-02-01, reason: first, prices: {input: 1, output: 2}}
- provider: openai
  model: m
  from: 2026-02-01
  reason: second
  prices: {input: 3, cache_read: 0.5, output: 4}
  tiers: {flex: {input: 1.5, output: 2}}
- {provider: openai, model: free, from: 2026-01-01, reason: runs here, prices: {input: 0, output: 0}}
- {provider: openai, model: gpt-6-luna, from: 2026-01-01, reason: negotiated, prices: {input: 7, output: 7}}
"""


@pytest.mark.parametrize(
    ("day", "micros"),
    [("2025-12-31", None), ("2026-01-01", 120), ("2026-01-31", 120), ("2026-02-01", 340), ("2030-01-01", 340)],
)
def test_overrides_hold_from_until(day: str, micros: int | None) -> None:
    clock = FixedClock(datetime.fromisoformat(f"{day}T23:59:59+00:00"))
    pricer = GenaiPricer(clock=clock, overrides=read_overrides(TABLE))
    assert pricer.price("openai", "m", Usage(input_tokens=100, output_tokens=10)) == micros


def test_overrides_go_before_the_snapshot() -> None:
    pricer = GenaiPricer(clock=NOVEMBER, overrides=read_overrides(TABLE))
    assert pricer.price("openai", "gpt-6-luna", Usage(input_tokens=10, output_tokens=10)) == 140
    assert pricer.price("openai", "free", Usage(input_tokens=10, output_tokens=10)) == 0
    assert pricer.price("openai", "m", Usage(input_tokens=10, cache_read_tokens=10)) == 5
    assert pricer.price("openai", "m", Usage(input_tokens=10), service_tier="flex") == 15
    assert pricer.price("openai", "m", Usage(input_tokens=10), service_tier="batch") is None


def test_the_version_names_both_tables() -> None:
    other = GenaiPricer(overrides=[Override("openai", "m", date(2026, 1, 1), None, {"input": Decimal(1)})])
    assert PRICER.version.startswith("genai-prices ")
    assert PRICER.version == GenaiPricer().version
    assert PRICER.version != other.version
    assert PRICER.version.partition("+")[0] == other.version.partition("+")[0]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{model: m, from: 2026-01-01, reason: r, prices: {input: 1, output: 1}}", "provider"),
        ("{provider: p, model: m, from: 2026-01-01, reason: '', prices: {input: 1, output: 1}}", "reason"),
        ("{provider: p, model: m, from: soon, reason: r, prices: {input: 1, output: 1}}", "soon"),
        ("{provider: p, model: m, from: 2026-01-01, reason: r, prices: {input: 1}}", "output"),
        ("{provider: p, model: m, from: 2026-01-01, reason: r, prices: {input: -1, output: 1}}", "negative"),
        ("{provider: p, model: m, from: 2026-01-01, reason: r, prices: {input: 1, output: 1, imput: 2}}", "imput"),
        ("{provider: p, model: m, from: 2026-01-01, reason: r, prices: {input: x, output: 1}}", "Entry 1"),
        ("{provider: p, model: m, from: 2026-01-01, reason: r, prices: {input: nan, output: 1}}", "none negative"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(entry: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        read_overrides(f"- {entry}")


def test_an_override_is_needed() -> None:
    """When the snapshot has learnt a model, its entry in prices.yaml has lost its reason."""
    without = GenaiPricer(clock=NOVEMBER, overrides=())
    usage = Usage(input_tokens=100, output_tokens=100)
    for model in ("gpt-6.2-sol", "gpt-6.2-astra"):
        assert without.price("openai", model, usage) is None
        assert PRICER.price("openai", model, usage) is not None


def test_cached_rates_give_what_the_library_computes() -> None:
    """For every model of both providers: each kind of token alone, and mixtures; tiers with a price of their own."""
    chance = random.Random(5)
    checked = by_rate = 0
    for provider in PRICER._loaded().providers:
        if provider.id not in ("openai", "anthropic"):
            continue
        for model in provider.models:
            for tier in (None, "flex", "priority", "batch"):
                priced = PRICER._read(provider.id, model.id, tier, NOVEMBER.now())
                if priced is None:
                    continue
                for _ in range(4):
                    parts = [chance.choice((0, 1, 77, 4_321, 250_000)) for _ in range(5)]
                    usage = Usage(parts[0] + parts[1] + parts[2] + parts[3], *parts[1:])
                    exact = _micros(PRICER._calculated(priced, usage, NOVEMBER.now()), free=False)
                    found = PRICER._from_snapshot(provider.id, model.id, usage, tier, NOVEMBER.now())
                    assert found == exact, (model.id, tier, usage)
                    checked += 1
                    by_rate += priced.rates is not None
    assert by_rate > checked / 2 > 100
