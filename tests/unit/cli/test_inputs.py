"""Inputs from the command line."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gorgon_common.cli.inputs import read_inputs
from gorgon_common.errors import InputInvalid

SCHEMAS: dict[str, dict[str, Any]] = {
    "text": {"type": "string"},
    "count": {"type": "integer"},
    "share": {"type": "number"},
    "sure": {"type": "boolean"},
    "names": {"type": "array", "items": {"type": "string"}},
    "points": {"type": "array", "items": {"type": "object"}},
    "map": {"type": "object"},
    "either": {"type": ["string", "null"]},
    "any": {},
}


@pytest.mark.parametrize(
    ("given", "value"),
    [
        ("text=42", "42"),
        ("text=a=b", "a=b"),
        ("text=", ""),
        ("text=@@home", "@home"),
        ("count=42", 42),
        ("share=0.5", 0.5),
        ("share=1e3", 1000.0),
        ("sure=true", True),
        ("sure=no", False),
        ('names=["a", "b"]', ["a", "b"]),
        ("names=a", ["a"]),
        ('points=[{"x": 1}]', [{"x": 1}]),
        ('map={"a": null}', {"a": None}),
        ("either=null", None),
        ("either=word", "word"),
        ("any=3", 3),
        ("any=three", "three"),
        ("unknown=3", 3),
    ],
)
def test_a_value_is_what_the_schema_asks_for(given: str, value: object) -> None:
    inputs = read_inputs([given], None, SCHEMAS)
    assert inputs == {given.partition("=")[0]: value}
    assert type(inputs[given.partition("=")[0]]) is type(value)


def test_an_array_takes_several(tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("c\n\nd\n")
    given = ["names=a", "names=b", f"names=@{tmp_path / 'more.txt'}", 'names=["e"]']
    assert read_inputs(given, None, SCHEMAS) == {"names": ["a", "b", "c", "d", "e"]}


def test_a_file_is_read_as_the_schema_asks(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"x": 1}')
    (tmp_path / "a.yaml").write_text("- {x: 1}\n")
    given = [f"text=@{tmp_path / 'a.json'}", f"map=@{tmp_path / 'a.json'}", f"points=@{tmp_path / 'a.yaml'}"]
    assert read_inputs(given, None, SCHEMAS) == {"text": '{"x": 1}', "map": {"x": 1}, "points": [{"x": 1}]}


def test_single_values_win_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "in.yaml"
    file.write_text("text: from file\ncount: 1\n")
    assert read_inputs(["count=2"], str(file), SCHEMAS) == {"text": "from file", "count": 2}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["count=many"], "must be an integer, and 'many' is not valid JSON"),
        (["points=a"], "must be an array"),
        (["text"], "is not NAME=VALUE"),
        (["=3"], "is not NAME=VALUE"),
        (["count=1", "count=2"], "given 2 times"),
        (["text=@/nowhere/at/all"], "There is no file /nowhere"),
    ],
)
def test_what_cannot_be_is_told(given: list[str], told: str) -> None:
    with pytest.raises(InputInvalid, match=told):
        read_inputs(given, None, SCHEMAS)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b"{", "not valid JSON"),
        ("a.yaml", b"a: [", "a.yaml:1:5: this is not valid YAML"),
        ("a.json", b"[1]", "must hold a mapping"),
        ("a.json", b"\xff", "not UTF-8"),
    ],
)
def test_a_file_that_cannot_be_is_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InputInvalid, match=told):
        read_inputs([], str(file), SCHEMAS)


def test_yaml_is_read_as_in_a_workflow(tmp_path: Path) -> None:
    file = tmp_path / "in.yaml"
    file.write_text("map: {country: NO, at: 12:30, zip: 01234, day: 2026-11-30, flag: on, yes: y}\n")
    expected = {"country": "NO", "at": "12:30", "zip": 1234, "day": "2026-11-30", "flag": "on", "yes": "y"}
    assert read_inputs([], str(file), SCHEMAS) == {"map": expected}
    file.write_text("{country: NO, at: 12:30, zip: 01234, day: 2026-11-30, flag: on, yes: y}\n")
    assert read_inputs([f"map=@{file}"], None, SCHEMAS) == {"map": expected}


def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path) -> None:
    for name, data in (("bom.json", b'\xef\xbb\xbf{"text": "x"}'), ("w.json", '{"text": "x"}'.encode("utf-16"))):
        (tmp_path / name).write_bytes(data)
        assert read_inputs([], str(tmp_path / name), SCHEMAS) == {"text": "x"}
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_inputs([f"text=@{tmp_path / 't.txt'}"], None, SCHEMAS) == {"text": "hello"}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", '{"text": "a", "text": "b"}', "the key 'text' is written twice"),
        ("a.yaml", "text: a\ntext: b\n", "a.yaml:2:1: `text` is written twice"),
        ("a.yaml", "count: .nan\n", "`.nan` is not a number that can be used"),
        ("a.json", '{"count": NaN}', "NaN is not a JSON number"),
        ("a.json", '{"count": 1e999}', "1e999 is too large for a number"),
        ("a.yaml", '{"count": -Infinity}', "-Infinity is not a JSON number"),
        ("a.json", '{"points": ' + "[" * 300 + "]" * 300 + "}", "nested deeper than 200 levels"),
        ("a.json", '{"points": ' + "[" * 100_000, "nested deeper than 200 levels"),
    ],
)
def test_what_is_not_data_is_refused(tmp_path: Path, name: str, content: str, told: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputInvalid, match=re.escape(told)):
        read_inputs([], str(tmp_path / name), SCHEMAS)


def test_a_mapping_does_not_become_a_list_of_one(tmp_path: Path) -> None:
    for name in ("a.json", "a.yaml", "a"):
        (tmp_path / name).write_text('{"x": 1}')
        with pytest.raises(InputInvalid, match=r"must be an array, and .* holds a mapping"):
            read_inputs([f"points=@{tmp_path / name}"], None, SCHEMAS)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_number_on_the_command_line_is_finite(value: str) -> None:
    with pytest.raises(InputInvalid, match="is not valid JSON"):
        read_inputs([f"count={value}"], None, SCHEMAS)
