"""Control characters are shown, in text and in JSON."""

from __future__ import annotations

import json
import unicodedata

import pytest

from gorgon_common.printable import json_safe, single_line, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text", "plain text"),
        ("naïve — 日本 👩\u200d💻", "naïve — 日本 👩\u200d💻"),
        ("a\tb\nc", "a\tb\nc"),
        ("windows\r\nlines", "windows\nlines"),
        ("fine\rhidden", r"fine\x0dhidden"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202eevil\u2066", r"\u202eevil\u2066"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
    ],
)
def test_what_steers_is_shown(text: str, shown: str) -> None:
    assert visible(text) == shown


def test_every_control_and_direction_is_covered() -> None:
    for code in (*range(0x10000), *range(0xE0000, 0xE0100)):
        sign = chr(code)
        steers = unicodedata.category(sign) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(sign) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        )
        assert (visible(sign) != sign) >= (steers and sign not in "\t\n"), hex(code)


def test_a_single_line_stays_one() -> None:
    assert single_line("a\nERROR forged") == r"a\nERROR forged"


def test_json_stays_exact() -> None:
    value = "\x00\x1b\x7f\x9b\u202e\u2028\U000e0041 é 日"
    text = json_safe(json.dumps({value: value}, ensure_ascii=False))
    assert json.loads(text) == {value: value}
    assert visible(text) == text
    assert "é 日" in text
