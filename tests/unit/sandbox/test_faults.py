"""Rules of faults, and the triggers in prompts that say the same."""

from __future__ import annotations

from typing import Any

import pytest

from gorgon_api.sandbox.calls import without_triggers
from gorgon_api.sandbox.faults import Fault, Faults, Subject, parse_duration, parse_size, read_triggers


def subject(text: str = "", **fields: str) -> Subject:
    return Subject(
        **{"provider": "openai", "account": "a", "model": "gpt-5", "role": "planner", "text": text, **fields}
    )


def hits(faults: Faults, count: int, text: str = "") -> list[bool]:
    return [bool(faults.effects(subject(text)).rules) for _ in range(count)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[sandbox: status=500 times=2 key=abc]]", {"status": "500", "times": "2", "key": "abc"}),
        ("do it [[sandbox: refuse]] now", {"refuse": True}),
        ("[[Sandbox: delay=2s]]", {"delay": "2s"}),
        ('[[sandbox: json={"a": [[1, 2]], "b": "]]"}]] end', {"json": {"a": [[1, 2]], "b": "]]"}}),
        ('[[sandbox: json={"a": 1} times=3]]', {"json": {"a": 1}, "times": "3"}),
        ("[[sandbox: text=hello there world]]", {"text": "hello there world"}),
        ('[[sandbox: text="hello there" times=1]]', {"text": "hello there", "times": "1"}),
    ],
)
def test_triggers_are_read(text: str, words: dict[str, Any]) -> None:
    assert read_triggers(text) == [words]


def test_several_triggers_in_one_prompt() -> None:
    assert read_triggers("[[sandbox: delay=1s]] x [[sandbox: refuse]]") == [{"delay": "1s"}, {"refuse": True}]


@pytest.mark.parametrize("text", ["no trigger", "[[ sandbox ]]", "a [[1]] b"])
def test_other_brackets_are_no_triggers(text: str) -> None:
    assert read_triggers(text) == []
    assert without_triggers(text) == text


def test_triggers_are_taken_out_of_a_prompt() -> None:
    assert without_triggers('one [[sandbox: json={"a": [[1]]}]]two[[sandbox: refuse]] three') == "one two three"


@pytest.mark.parametrize(
    "text", ["[[sandbox: statsu=500]]", "[[sandbox: status=200]]", "[[sandbox: json=x]]", "[[sandbox: =]]"]
)
def test_a_trigger_that_makes_no_sense_is_told(text: str) -> None:
    with pytest.raises(ValueError, match=r"statsu|200|json|cannot read"):
        Faults(0).effects(subject(text))


def test_times_counts_by_key() -> None:
    faults = Faults(0)
    first, second = "[[sandbox: status=500 times=2 key=a]]", "[[sandbox: status=500 times=2 key=b]]"
    assert hits(faults, 3, first) == [True, True, False]
    assert hits(faults, 3, second) == [True, True, False]


def test_which_requests_are_hit() -> None:
    faults = Faults(0)
    faults.add(Fault.parse({"nth": 2, "status": 500}))
    assert hits(faults, 4) == [False, True, False, False]
    faults.clear()
    faults.add(Fault.parse({"every": 3, "after": 1, "status": 500}))
    assert hits(faults, 8) == [False, False, False, True, False, False, True, False]


def test_probability_is_repeatable() -> None:
    def once(seed: int) -> list[bool]:
        faults = Faults(seed)
        faults.add(Fault.parse({"probability": 0.3, "status": 500}))
        return hits(faults, 1000)

    assert once(1) == once(1)
    assert once(1) != once(2)
    assert 240 < sum(once(1)) < 360


@pytest.mark.parametrize(
    ("rule", "fields", "hit"),
    [
        ({"provider": "anthropic"}, {}, False),
        ({"model": "gpt-*"}, {}, True),
        ({"role": "planner", "account": "a"}, {}, True),
        ({"role": "builder"}, {}, False),
        ({"contains": "needle"}, {"text": "hay needle hay"}, True),
        ({"contains": "needle"}, {}, False),
    ],
)
def test_rules_match_by_field(rule: dict[str, Any], fields: dict[str, str], hit: bool) -> None:
    faults = Faults(0)
    faults.add(Fault.parse({**rule, "status": 500}))
    assert bool(faults.effects(subject(**fields)).rules) is hit


def test_rules_work_together() -> None:
    faults = Faults(0)
    for rule in ({"delay": "1s"}, {"delay": 0.5, "status": 503}, {"status": 500}):
        faults.add(Fault.parse(rule))
    effects = faults.effects(subject())
    assert (effects.delay, effects.first("status")) == (1.5, 503)
    assert effects.names == ["delay=1.0", "status=503", "delay=0.5", "status=500"]


@pytest.mark.parametrize(("text", "seconds"), [("500ms", 0.5), ("2s", 2.0), ("1.5m", 90.0), ("0", 0.0), (3, 3.0)])
def test_durations(text: str | int, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(("text", "size"), [("10MB", 10_000_000), ("2kB", 2000), (4096, 4096)])
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["soon", "-1s", "", "2 days"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)
