"""JSON without NaN and infinity."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from gorgon_common import strict_json


@pytest.mark.parametrize("text", ["NaN", "[-Infinity]", '{"a": [Infinity]}', "1e999", '{"a": -1e400}'])
def test_what_is_not_finite_is_refused(text: str) -> None:
    with pytest.raises(strict_json.NotFinite):
        strict_json.loads(text)


@pytest.mark.parametrize("text", ["1e308", "-0.0", '"NaN"', '{"NaN": 1}', "123456789012345678901234567890"])
def test_everything_else_is_read(text: str) -> None:
    assert strict_json.loads(text) == json.loads(text)


@pytest.mark.parametrize("depth", [201, 3_000, 1_000_000])
def test_depth_is_bounded(depth: int) -> None:
    with pytest.raises(strict_json.TooDeep):
        strict_json.loads("[" * depth + "]" * depth)


def test_two_hundred_levels_and_many_shallow_ones_are_fine() -> None:
    strict_json.loads("[" * 200 + "]" * 200)
    assert len(strict_json.loads("[" + ",".join(["[]"] * 1000) + "]")) == 1000


@pytest.mark.parametrize("value", [math.nan, math.inf, [1, {"a": -math.inf}], {math.nan: 1}])
def test_what_is_written_is_always_json(value: Any) -> None:
    text = strict_json.dumps(value)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    json.loads(text, parse_constant=refuse)


def test_a_stored_row_is_read_with_null_in_place_of_them() -> None:
    assert strict_json.loads_stored('{"a": NaN, "b": [Infinity, -Infinity, 1.5]}') == {
        "a": None,
        "b": [None, None, 1.5],
    }


def test_the_first_is_found() -> None:
    assert strict_json.not_finite({"a": [1, {"b": math.inf}], "c": math.nan}) == ("a", 1, "b")
    assert strict_json.not_finite({"a": [1, "NaN", None, True]}) is None
