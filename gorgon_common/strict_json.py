"""JSON without NaN and infinity, which Python reads and writes but other programs do not accept.

`loads` rejects them in external data, `dumps` never writes them, and `loads_stored` reads rows that earlier versions
wrote with them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

MAX_DEPTH = 200
"""Levels of lists and objects; code that walks over deeper data would fail later."""


class NotFinite(ValueError):
    """NaN, Infinity, or a number too large for a float."""


class TooDeep(ValueError):
    """More than MAX_DEPTH levels of lists and objects."""


def loads(text: str, *, unique_keys: bool = False) -> Any:
    """Return the value of a JSON text.

    Raises ValueError: NotFinite for NaN, infinity and numbers that round to it; TooDeep; for half a surrogate pair; and
    with `unique_keys` also for a duplicate key in an object.
    """
    pairs = _unique if unique_keys else None
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_decimal, object_pairs_hook=pairs)
    except RecursionError:
        raise TooDeep(_TOO_DEEP) from None
    if "\\u" in text and not _encodable(value):
        raise ValueError("a text in it holds half of a surrogate pair")
    if text.count("[") + text.count("{") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise TooDeep(_TOO_DEEP)
    return value


def loads_stored(text: str) -> Any:
    """Return the value of a stored text; NaN and infinity, which earlier versions stored, become null."""
    return json.loads(text, parse_constant=_null)


def dumps(
    value: Any,
    *,
    indent: int | None = None,
    default: Callable[[Any], Any] | None = None,
    compact: bool = False,
) -> str:
    """Return JSON text; numbers that are not finite are written as null, so that the text is always valid JSON."""
    separators = (",", ":") if compact else None
    options: dict[str, Any] = {"ensure_ascii": False, "indent": indent, "default": default, "separators": separators}
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(finite(value), allow_nan=False, **options)


def finite(value: Any) -> Any:
    """Return a JSON value with null in place of NaN and infinity."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {finite_key(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


def finite_key(key: Any) -> Any:
    """Return the key of an object; a number that is not finite becomes its name."""
    return str(key) if isinstance(key, float) and not math.isfinite(key) else key


def not_finite(value: Any) -> tuple[str | int, ...] | None:
    """Return the path of the first number in a JSON value that is not finite; None if there is none."""
    waiting: list[tuple[tuple[str | int, ...], Any]] = [((), value)]
    while waiting:
        path, entry = waiting.pop()
        if isinstance(entry, float):
            if not math.isfinite(entry):
                return path
        elif isinstance(entry, Mapping):
            waiting.extend(((*path, str(key)), part) for key, part in reversed(list(entry.items())))
        elif isinstance(entry, (list, tuple)):
            waiting.extend(((*path, index), part) for index, part in reversed(list(enumerate(entry))))
    return None


_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"


def _refuse(name: str) -> Any:
    raise NotFinite(f"{name} is not a JSON number")


def _decimal(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise NotFinite(f"{shown} is too large for a number")
    return number


def _null(name: str) -> None:
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is written twice")
    return made


def _encodable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _deeper(value: Any, levels: int) -> bool:
    """Return whether the lists and objects in a value are nested more than `levels` deep."""
    row = [value]
    for _ in range(levels):
        row = [
            part
            for entry in row
            if isinstance(entry, (dict, list))
            for part in (entry.values() if isinstance(entry, dict) else entry)
            if isinstance(part, (dict, list))
        ]
        if not row:
            return False
    return True
