"""Durations as people write them: `500ms`, `30s`, `1h30m`.  Files, settings and headers of providers use this parser.

Two other notations are not ours and are read where they belong: `duration()` in expressions follows CEL
(`workflow/expressions/functions.py`), and the sandbox is a program of its own that imports nothing of this package.
"""

from __future__ import annotations

import re

HINT = "Write 30s, 5m, 24h, 1h30m or a number of seconds."

_PART = r"(?:([0-9]+(?:\.[0-9]+)?){})?"
_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 0.001}
_DURATION = re.compile("".join(_PART.format(unit) for unit in _UNITS))
_BARE = re.compile(r"[0-9]+(?:\.[0-9]+)?")

PATTERN = r"^\s*((\d+(\.\d+)?\s*(d|h|m|s|ms)\s*)+|\d+(\.\d+)?\s*)$"
"""What a JSON Schema can say of the notation: everything but the order of the units."""


class NotADuration(ValueError):
    """The text is not a duration."""

    hint = HINT


def parse(text: str) -> float:
    """Return the seconds of a duration: numbers with the units d, h, m, s and ms in this order, or one bare number.

    Blanks are ignored.  Raises NotADuration, whose message names the text; `hint` names the accepted forms.
    """
    written = text.strip().replace(" ", "")
    if _BARE.fullmatch(written):
        return float(written)
    found = _DURATION.fullmatch(written)
    if found is None or not written:
        raise NotADuration(f"`{text}` is not a duration")
    return sum(float(number) * unit for number, unit in zip(found.groups(), _UNITS.values(), strict=True) if number)


def text(seconds: float) -> str:
    """Return the canonical text of a duration, to the millisecond: 90 is `1m30s`."""
    left = round(seconds * 1000)
    if left == 0:
        return "0s"
    written = ""
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        written += f"{count}{unit}" if count else ""
    return written
