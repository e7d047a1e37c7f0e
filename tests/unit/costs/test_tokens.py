"""The token estimate: what it counts, and what real counts make of it."""

from __future__ import annotations

import math

import pytest

from gorgon_common.costs.tokens import (
    UNSEEN_ERROR,
    Calibration,
    Ratio,
    TokenEstimator,
    count,
    count_call,
    family_of,
)
from gorgon_common.costs.usage import Usage

SONNET = ("anthropic", "claude-sonnet-5-5")


def seen(*ratios: float) -> Ratio:
    return sum((Ratio(1, math.log(ratio), math.log(ratio) ** 2) for ratio in ratios), Ratio())


@pytest.mark.parametrize(
    ("text", "least", "most"),
    [
        ("", 0, 0),
        ("Review this file.", 3, 6),
        ("internationalization", 3, 6),
        ("2026-11-22T09:30:00Z", 7, 16),
        ("日本語のテキスト", 7, 12),
        ("a\n\n\nb\tc", 3, 6),
    ],
)
def test_a_text_has_about_as_many_tokens_as_tokenizers_make_of_it(text: str, least: int, most: int) -> None:
    assert least <= count(text, "claude-sonnet-5-5") <= most
    assert least <= count(text, "gpt-6.1-terra") <= most


def test_more_text_is_never_fewer_tokens() -> None:
    text = "Plan the feature; keep {braces}, 42 numbers and ünïcödé 😀.\n" * 5
    counts = [count(text[:length], "gpt-6.1-sol") for length in range(0, len(text), 7)]
    assert counts == sorted(counts)


def test_families_are_told_by_name() -> None:
    assert family_of("claude-opus-5-5").name == "claude"
    assert family_of("gpt-6-luna").name == "gpt"
    assert family_of("llama3").name == "other"


def test_a_call_counts_its_system_its_turns_and_its_schema() -> None:
    plain = count_call("gpt-6", system=None, messages=["hello there"], schema=None)
    assert count_call("gpt-6", system="Be brief.", messages=["hello there"], schema=None) > plain
    assert count_call("gpt-6", system=None, messages=["hello there", "again"], schema=None) > plain
    assert count_call("gpt-6", system=None, messages=["hello there"], schema={"type": "object"}) > plain


def test_without_experience_the_error_is_large_and_with_it_small() -> None:
    text = "word " * 400
    blind = TokenEstimator().estimate(*SONNET, text)
    assert (blind.error, blind.calls) == (UNSEEN_ERROR, 0)
    taught = TokenEstimator({SONNET: seen(*[1.3] * 50)}).estimate(*SONNET, text)
    assert taught.calls == 50
    assert taught.error < 0.1
    assert taught.tokens == pytest.approx(blind.tokens * 1.3, rel=0.02)


def test_few_observations_move_the_estimate_only_a_little() -> None:
    one, many = seen(2.0), seen(*[2.0] * 100)
    assert 1.0 < one.factor < many.factor < 2.0
    assert one.error > many.error


def test_a_spread_of_ratios_is_told_as_error() -> None:
    assert seen(*[0.7, 1.4] * 50).error > 3 * seen(*[1.0] * 100).error


def test_a_new_model_learns_from_its_family_at_the_same_provider_only() -> None:
    known = TokenEstimator({SONNET: seen(*[1.5] * 100)})
    assert known.ratio("anthropic", "claude-opus-5-5").factor > 1.1
    assert known.ratio("anthropic", "claude-opus-5-5").error > known.ratio(*SONNET).error
    assert known.ratio("openai", "gpt-6").factor == 1.0
    assert known.ratio("other", "claude-opus-5-5").calls == 0


def test_the_factor_of_a_target_holds_until_something_was_seen() -> None:
    text = "word " * 100
    assert TokenEstimator(unseen=0.5).estimate(*SONNET, text).tokens == 50
    assert TokenEstimator({SONNET: seen(*[1.0] * 9)}, unseen=0.5).estimate(*SONNET, text).tokens == 100


def test_what_is_known_can_be_shown() -> None:
    (row,) = TokenEstimator({SONNET: seen(*[1.2] * 40)}).describe()
    assert (row["model"], row["family"], row["calls"]) == ("claude-sonnet-5-5", "claude", 40)
    assert row["ratio"] == pytest.approx(1.19, abs=0.01)
    assert 0 < row["error"] < UNSEEN_ERROR


def test_observations_are_handed_on_in_portions_and_never_twice() -> None:
    stored: list[dict[tuple[str, str], Ratio]] = []
    calibration = Calibration(lambda seen: stored.append(dict(seen)), every=3)
    for _ in range(4):
        calibration.observe(*SONNET, 100.0, Usage(input_tokens=150))
    assert [entry[SONNET].calls for entry in stored] == [3]
    calibration.flush()
    calibration.flush()
    assert [entry[SONNET].calls for entry in stored] == [3, 1]
    assert stored[0][SONNET].log_sum == pytest.approx(3 * math.log(1.5))


def test_what_was_seen_is_not_kept_for_long() -> None:
    stored: list[int] = []
    now = [0.0]
    calibration = Calibration(lambda seen: stored.append(seen[SONNET].calls), seconds=60, clock=lambda: now[0])
    for moment in (1000.0, 1059.0, 1060.0, 2000.0, 2059.0, 2061.0):
        now[0] = moment
        calibration.observe(*SONNET, 100.0, Usage(input_tokens=150))
    assert stored == [3, 3]


@pytest.mark.parametrize(("estimated", "counted"), [(0.0, 10), (10.0, 0), (10.0, 1000), (1000.0, 10)])
def test_what_tells_nothing_of_tokens_is_not_learned(estimated: float, counted: int) -> None:
    stored: list[object] = []
    calibration = Calibration(stored.append)
    calibration.observe(*SONNET, estimated, Usage(input_tokens=counted))
    calibration.flush()
    assert stored == []
