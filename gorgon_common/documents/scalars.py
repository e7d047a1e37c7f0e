"""The value of a plain YAML scalar: the core schema of YAML 1.2 (`on`, `NO`, `12:30` and dates are text)."""

from __future__ import annotations

import math
import re
from typing import Any

from gorgon_common.strict_json import NotFinite

_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_TRUE = frozenset({"true", "True", "TRUE"})
_FALSE = frozenset({"false", "False", "FALSE"})
_INT = re.compile(r"[-+]?[0-9]{1,400}")
_OCTAL = re.compile(r"0o[0-7]{1,400}")
_HEX = re.compile(r"0x[0-9a-fA-F]{1,400}")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def plain_scalar(text: str) -> Any:
    """Return the value of a scalar without quotes.  Raises NotFinite for `.nan`, `.inf` and what rounds to it."""
    if text in _NULL:
        return None
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    if text[0] in "-+.0123456789":
        return _number(text)
    return text


def _number(text: str) -> Any:
    if _INT.fullmatch(text):
        return int(text)
    if _OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if _HEX.fullmatch(text):
        return int(text[2:], 16)
    number = math.inf if _NOT_FINITE.fullmatch(text) else None
    if number is None and _FLOAT.fullmatch(text):
        number = float(text)
    if number is None:
        return text
    if not math.isfinite(number):
        raise NotFinite(f"`{text[:40]}` is not a number that can be used")
    return number
