"""Headers as the providers write them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from gorgon_common.engine.limits import Signal
from gorgon_common.ratelimit.headers import seconds, signals


class Noon:
    def now(self) -> datetime:
        return datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)

    def monotonic(self) -> float:
        return 0.0


@pytest.mark.parametrize(
    ("text", "value"),
    [("120ms", 0.12), ("6m0s", 360), ("1h2m3s", 3723), ("8.64s", 8.64), ("17", 17), ("0", 0), ("1d", 86_400)],
)
def test_durations(text: str, value: float) -> None:
    assert seconds(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "soon", "6x", "m6", "-3", "nan", "inf", "1s later"])
def test_what_is_no_duration_says_nothing(text: str) -> None:
    assert seconds(text) is None


def test_openai() -> None:
    found = signals(
        "openai",
        {
            "x-ratelimit-limit-requests": "600",
            "x-ratelimit-remaining-requests": "599",
            "x-ratelimit-reset-requests": "100ms",
            "x-ratelimit-limit-tokens": "90000",
            "x-ratelimit-remaining-tokens": "80000",
            "x-ratelimit-reset-tokens": "6m0s",
        },
    )
    assert found == {"requests": Signal(600, 599, 0.1), "tokens": Signal(90_000, 80_000, 360)}


def test_anthropic() -> None:
    """Its tokens are the sum of two limits that are told themselves."""
    found = signals(
        "anthropic",
        {
            "anthropic-ratelimit-requests-limit": "50",
            "anthropic-ratelimit-requests-remaining": "49",
            "anthropic-ratelimit-requests-reset": "2026-11-22T12:00:02Z",
            "anthropic-ratelimit-tokens-limit": "38000",
            "anthropic-ratelimit-tokens-remaining": "38000",
            "anthropic-ratelimit-input-tokens-limit": "30000",
            "anthropic-ratelimit-input-tokens-remaining": "29000",
            "anthropic-ratelimit-input-tokens-reset": "2026-11-22T11:59:00Z",
            "anthropic-ratelimit-output-tokens-limit": "8000",
        },
        clock=Noon(),
    )
    assert found == {
        "requests": Signal(50, 49, 2.0, absolute=True),
        "input_tokens": Signal(30_000, 29_000, 0.0, absolute=True),
        "output_tokens": Signal(8000, None, None, absolute=True),
    }


@pytest.mark.parametrize("value", ["-1", "many", "", "nan", "inf", "1e300"])
def test_nonsense_says_nothing(value: str) -> None:
    assert signals("openai", {"x-ratelimit-limit-requests": value, "x-ratelimit-remaining-requests": value}) == {}


def test_a_limit_of_nothing_is_not_believed() -> None:
    found = signals("openai", {"x-ratelimit-limit-requests": "0", "x-ratelimit-remaining-requests": "0"})
    assert found == {"requests": Signal(None, 0, None)}
