"""JSON that a model wrote: only what can be stored, passed on and computed with."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_NESTING = 100
"""Levels of arrays and objects.  Deeper values break what walks them: serializers, schemas, expressions."""


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises ValueError with the reason for what is not JSON, NaN and infinities (also as 1e999), half a surrogate pair,
    and what is nested more than MAX_NESTING levels deep.
    """
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if _deep(value):
        raise ValueError(_TOO_DEEP)
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a text in it holds half of a surrogate pair") from None
    return value


_TOO_DEEP = f"it is nested more than {MAX_NESTING} levels deep"


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


def _deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [
            inner
            for entry in level
            for inner in (entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list) else ())
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True
