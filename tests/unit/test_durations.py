"""The one notation of durations."""

from __future__ import annotations

import pytest

from gorgon_common import durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("500ms", 0.5), ("2s", 2), ("1.5m", 90), ("1h", 3600), ("2d", 172800), ("1h30m", 5400), ("1h 30m", 5400)],
        *[(" 5m ", 300), ("6m0s", 360), ("3", 3), ("0.25", 0.25), ("1d1h1m1s1ms", 90061.001)],
    ],
)
def test_accepted_forms(text: str, seconds: float) -> None:
    assert durations.parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", " ", "s", "m", "-1s", "1 day", "5 minutes", "1e3", "30m1h", "1s2s", "inf", "٣s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(durations.NotADuration, match="is not a duration"):
        durations.parse(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(300, "5m"), (90, "1m30s"), (5400, "1h30m"), (86400, "24h"), (0.5, "500ms"), (0, "0s")]
)
def test_one_text(seconds: float, text: str) -> None:
    assert durations.text(seconds) == text
    assert durations.parse(text) == seconds
