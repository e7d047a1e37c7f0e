"""Buckets, windows and gates, on a clock that the test moves."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gorgon_api.sandbox.limits import Bucket, Gate, Limit, Limits, Window


def gate(**fields: Any) -> Gate:
    return Gate(Limit.parse(fields), 0.0)


def test_a_bucket_starts_full_and_refills_evenly() -> None:
    bucket = Bucket(60, 60.0, 60, 0.0)
    bucket.take(60, 0.0)
    assert bucket.wait(1, 0.0) == pytest.approx(1.0)
    assert bucket.level(30.0) == pytest.approx(30)
    assert bucket.full_in(30.0) == pytest.approx(30)
    assert bucket.level(1000.0) == 60


def test_a_bucket_can_owe() -> None:
    bucket = Bucket(60, 60.0, 60, 0.0)
    bucket.take(90, 0.0)
    assert bucket.wait(1, 0.0) == pytest.approx(31.0)


def test_what_is_larger_than_the_capacity_never_fits() -> None:
    assert math.isinf(Bucket(60, 60.0, 6, 0.0).wait(7, 0.0))
    assert math.isinf(Window(60, 60.0, 10.0).wait(11, 0.0))


def test_a_window_starts_afresh() -> None:
    window = Window(60, 60.0, 10.0)
    window.take(10, 3.0)
    assert window.wait(1, 3.0) == pytest.approx(7.0)
    assert window.wait(1, 9.9) == pytest.approx(0.1)
    assert window.wait(10, 10.0) == 0


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 20)), max_size=200))
@settings(deadline=None, database=None)
def test_a_bucket_never_lets_more_through_than_its_rate(arrivals: list[tuple[float, int]]) -> None:
    bucket, now, let_in = Bucket(600, 60.0, 30, 0.0), 0.0, 0
    for pause, amount in arrivals:
        now += pause
        if bucket.wait(amount, now) == 0:
            bucket.take(amount, now)
            let_in += amount
    assert let_in <= 30 + now * 10 + 1e-6


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(1, 20)), max_size=200))
@settings(deadline=None, database=None)
def test_no_window_holds_more_than_its_share(arrivals: list[tuple[float, int]]) -> None:
    window, now, by_window = Window(600, 60.0, 10.0), 0.0, dict[int, int]()
    for pause, amount in arrivals:
        now += pause
        if window.wait(amount, now) == 0:
            window.take(amount, now)
            by_window[int(now // 10)] = by_window.get(int(now // 10), 0) + amount
    assert all(total <= 100 for total in by_window.values())


def test_a_gate_takes_all_or_nothing() -> None:
    subject = gate(requests=10, tokens=100)
    assert subject.admit({"requests": 1, "tokens": 90}, 0.0) is None
    denied = subject.admit({"requests": 1, "tokens": 20}, 0.0)
    assert denied is not None
    assert (denied.kind, denied.used, denied.requested) == ("tokens", 90, 20)
    assert subject.levels(0.0)["requests"].remaining == 9


def test_settling_gives_back_what_was_not_used() -> None:
    subject = gate(tokens=100)
    subject.admit({"tokens": 90}, 0.0)
    subject.settle({"tokens": 90}, {"tokens": 30}, 0.0)
    assert subject.levels(0.0)["tokens"].remaining == 70


def test_calls_in_flight_are_bounded() -> None:
    subject = gate(concurrent=1)
    assert subject.admit({}, 0.0) is None
    denied = subject.admit({}, 0.0)
    assert denied is not None
    assert denied.kind == "concurrent"
    subject.leave()
    assert subject.admit({}, 0.0) is None


def test_the_newest_rule_that_applies_wins() -> None:
    limits = Limits()
    limits.add(Limit.parse({"requests": 5}))
    limits.add(Limit.parse({"provider": "openai", "model": "gpt-*", "requests": 2}))
    found = [limits.gate(*key, 0.0).limit.requests for key in [("openai", "a", "gpt-5"), ("openai", "a", "o3")]]
    assert found == [2, 5]
    limits.clear()
    assert limits.gate("openai", "a", "gpt-5", 0.0).limit.requests == 600_000


def test_accounts_and_models_have_buckets_of_their_own() -> None:
    limits = Limits()
    limits.add(Limit.parse({"requests": 1}))
    keys = [("openai", "a", "m"), ("openai", "b", "m"), ("openai", "a", "n"), ("anthropic", "a", "m")]
    assert [limits.gate(*key, 0.0).admit({"requests": 1}, 0.0) for key in keys] == [None] * 4
    assert limits.gate(*keys[0], 0.0).admit({"requests": 1}, 0.0) is not None


@pytest.mark.parametrize("fields", [{"rpm": 3}, {"requests": 0}, {"requests": "many"}, {"mode": "leaky"}])
def test_a_limit_that_makes_no_sense_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rpm|requests|mode"):
        Limit.parse(fields)
