"""The functions of the language and their shared basis: equality, ordering, the meter.

A function receives the meter and its arguments, and raises TypeError for arguments of the wrong type.  Its caller turns
that into a message that contains the expression.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

import re2  # type: ignore[import-untyped]

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions.values import MAX_TEXT, StepValue, number_text, to_json, to_text, too_long

MAX_LIST = 100_000
"""Maximum length of a list that an expression creates or iterates over."""


class Meter:
    """Counts the cost of an evaluation: about one step per node, per twenty characters or per four items created."""

    __slots__ = ("steps",)

    LIMIT: ClassVar[int] = 1_000_000

    def __init__(self) -> None:
        self.steps = 0

    def spend(self, steps: int) -> None:
        """Count `steps` more."""
        self.steps += steps
        self.check()

    def check(self) -> None:
        """Raise if the cost limit is exceeded; for callers that catch errors and continue."""
        if self.steps > self.LIMIT:
            self.exhausted()

    def exhausted(self) -> None:
        """Raise ExpressionError: too expensive."""
        raise ExpressionError(
            f"the expression needs more than {self.LIMIT:,} steps", hint="Let a step of the workflow compute it."
        )

    def listed(self, length: int) -> None:
        """Count a list of `length` items that is created or iterated over."""
        if length > MAX_LIST:
            raise ExpressionError(f"a list of {length:,} items is too long for an expression; the most is {MAX_LIST:,}")
        self.spend(length // 4)

    def text(self, text: str) -> str:
        """Count a text that was created, and return it."""
        if len(text) > MAX_TEXT:
            raise too_long("the text", len(text))
        self.spend(len(text) // 20)
        return text


def of_type(value: Any) -> str:
    """Describe a value's type in words."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int():
            return "an integer"
        case float():
            return "a decimal"
        case str():
            return "text"
        case list() | tuple():
            return "a list"
        case datetime():
            return "a timestamp"
        case timedelta():
            return "a duration"
        case StepValue():
            return "a step"
        case Mapping():
            return "an object"
    return type(value).__name__


_SCALARS = frozenset({str, int, float, bool, type(None)})


def equal(left: Any, right: Any, meter: Meter) -> bool:
    """CEL's equality, defined for any two values: numbers compare by value, true and false never equal numbers."""
    if type(left) is type(right) and type(left) in _SCALARS:
        return bool(left == right)
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        meter.spend(1 + len(left) // 2)
        return len(left) == len(right) and all(equal(a, b, meter) for a, b in zip(left, right, strict=True))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        meter.spend(1 + len(left) // 2)
        return len(left) == len(right) and all(
            key in right and equal(value, right[key], meter) for key, value in left.items()
        )
    return bool(left == right)


def compare(left: Any, right: Any) -> int:
    """Return -1, 0 or 1, or 2 if one of them is NaN.  Raises TypeError across types."""
    numbers = (int, float)
    same = (
        (isinstance(left, numbers) and isinstance(right, numbers) and isinstance(left, bool) == isinstance(right, bool))
        or (isinstance(left, str) and isinstance(right, str))
        or (isinstance(left, datetime) and isinstance(right, datetime))
        or (isinstance(left, timedelta) and isinstance(right, timedelta))
    )
    if not same:
        raise TypeError
    return -1 if left < right else 1 if left > right else 0 if left == right else 2


def matches(meter: Meter, text: str, pattern: str) -> bool:
    """Return whether RE2 finds `pattern` anywhere in `text`; takes linear time in the text for any pattern."""
    _texts(text, pattern)
    meter.spend(10 + len(text) // 100)
    return regex(pattern).search(text) is not None


def regex(pattern: str) -> Any:
    """Return the compiled pattern (cached by RE2).  Raises ExpressionError."""
    options = re2.Options()
    options.log_errors = False  # otherwise RE2 writes to stderr
    options.max_mem = 1 << 20
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        text = error.args[0] if error.args else error
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        raise ExpressionError(
            f"`{pattern[:100]}` is not a regular expression: {text}",
            hint="The syntax is RE2's: no look-around, no back-references.",
        ) from None


def _texts(*values: Any) -> None:
    if not all(isinstance(value, str) for value in values):
        raise TypeError


def _size(meter: Meter, value: Any) -> int:
    if isinstance(value, (str, list, tuple, Mapping)):
        return len(value)
    raise TypeError


def _contains(meter: Meter, text: Any, part: Any) -> bool:
    _texts(text, part)
    meter.spend(len(text) // 1000)
    return part in text


def _starts(meter: Meter, text: Any, part: Any) -> bool:
    _texts(text, part)
    return bool(text.startswith(part))


def _ends(meter: Meter, text: Any, part: Any) -> bool:
    _texts(text, part)
    return bool(text.endswith(part))


_INTEGER = re.compile(r"[+-]?\d{1,19}")


def _int(meter: Meter, value: Any) -> int:
    match value:
        case bool():
            raise TypeError
        case int():
            return value
        case float():
            number = int(value) if abs(value) < 2**63 else None
        case str():
            number = int(value) if _INTEGER.fullmatch(value) else None
        case datetime():
            number = int(value.timestamp())
        case _:
            raise TypeError
    if number is None or not -(2**63) <= number < 2**63:
        raise ExpressionError(f"`{_short(value)}` is not a 64-bit integer")
    return number


def _uint(meter: Meter, value: Any) -> int:
    number = _int(meter, value)
    if number < 0:
        raise ExpressionError(f"`{_short(value)}` is below zero")
    return number


def _double(meter: Meter, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ExpressionError(f"`{_short(value)}` is not a number") from None
    if not math.isfinite(number):
        raise ExpressionError(f"`{_short(value)}` is not a finite number")
    return number


def _string(meter: Meter, value: Any) -> str:
    if isinstance(value, (bool, int, float, str, datetime, timedelta)):
        return to_text(value)
    raise TypeError


_TRUTH = {
    **dict.fromkeys(("true", "True", "TRUE", "t", "1"), True),
    **dict.fromkeys(("false", "False", "FALSE", "f", "0"), False),
}


def _bool(meter: Meter, value: Any) -> bool:
    if isinstance(value, bool):
        return value
    _texts(value)
    if value not in _TRUTH:
        raise ExpressionError(f"`{_short(value)}` is neither true nor false")
    return _TRUTH[value]


_RFC3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")


def _timestamp(meter: Meter, value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    try:
        if isinstance(value, int) and not isinstance(value, bool):
            return datetime.fromtimestamp(value, UTC)
        _texts(value)
        if _RFC3339.fullmatch(value):
            cut = re.sub(r"(\.\d{6})\d+", r"\1", value.upper())
            return datetime.fromisoformat(cut).astimezone(UTC)
    except (ValueError, OverflowError, OSError):
        pass
    raise ExpressionError(
        f"`{_short(value)}` is not a timestamp", hint='A timestamp looks like "2026-05-01T12:00:00Z".'
    )


_DURATION = re.compile(r"[+-]?(?:\d+(?:\.\d+)?(?:h|m(?!s)|s|ms|us|ns))+")
_PART = re.compile(r"(\d+(?:\.\d+)?)(h|ms|us|ns|m|s)")
_SECONDS = {"h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


def _duration(meter: Meter, value: Any) -> timedelta:
    if isinstance(value, timedelta):
        return value
    _texts(value)
    if len(value) > 40 or not _DURATION.fullmatch(value):
        raise ExpressionError(f"`{_short(value)}` is not a duration", hint='A duration looks like "90s" or "1h30m".')
    seconds = sum(float(number) * _SECONDS[unit] for number, unit in _PART.findall(value))
    try:
        return timedelta(seconds=-seconds if value.startswith("-") else seconds)
    except OverflowError:
        raise ExpressionError(f"`{_short(value)}` is too long") from None


def _type(meter: Meter, value: Any) -> str:
    names = {
        bool: "bool",
        int: "int",
        float: "double",
        str: "string",
        list: "list",
        dict: "map",
        type(None): "null_type",
    }
    return names.get(type(value), of_type(value))


def _json(meter: Meter, value: Any) -> str:
    return meter.text(to_json(value))


def _lines(meter: Meter, text: Any) -> list[str]:
    _texts(text)
    meter.listed(text.count("\n") + 1)
    found: list[str] = text.splitlines()
    meter.listed(len(found))
    return found


def _split(meter: Meter, text: Any, separator: Any) -> list[str]:
    _texts(text, separator)
    meter.listed(len(text) if separator == "" else text.count(separator) + 1)
    return list(text) if separator == "" else text.split(separator)


def _join(meter: Meter, items: Any, separator: Any = "") -> str:
    _texts(separator)
    if not isinstance(items, (list, tuple)):
        raise TypeError
    meter.listed(len(items))
    pieces = []
    length = -len(separator)
    for item in items:
        piece = to_text(item)
        length += len(piece) + len(separator)
        if length > MAX_TEXT:
            raise too_long("the text", length)
        pieces.append(piece)
    return meter.text(separator.join(pieces))


def _truncate(meter: Meter, text: Any, length: Any) -> str:
    if not isinstance(text, str):
        text = meter.text(to_text(text))
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError
    if length < 0:
        raise ExpressionError("`truncate` needs a length of 0 or more")
    if len(text) <= length:
        return str(text)
    return text[: length - 1] + "…" if length > 0 else ""


def _part(read: Callable[[datetime], int], of_duration: Callable[[timedelta], int] | None = None) -> Callable[..., int]:
    def get(meter: Meter, value: Any) -> int:
        if isinstance(value, datetime):
            return read(value.astimezone(UTC))
        if isinstance(value, timedelta) and of_duration is not None:
            return of_duration(value)
        raise TypeError

    return get


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "size": _size,
    "contains": _contains,
    "startsWith": _starts,
    "endsWith": _ends,
    "matches": matches,
    "int": _int,
    "uint": _uint,
    "double": _double,
    "string": _string,
    "bool": _bool,
    "timestamp": _timestamp,
    "duration": _duration,
    "dyn": lambda meter, value: value,
    "type": _type,
    "json": _json,
    "lines": _lines,
    "split": _split,
    "join": _join,
    "truncate": _truncate,
    "getFullYear": _part(lambda moment: moment.year),
    "getMonth": _part(lambda moment: moment.month - 1),
    "getDate": _part(lambda moment: moment.day),
    "getDayOfMonth": _part(lambda moment: moment.day - 1),
    "getDayOfWeek": _part(lambda moment: (moment.weekday() + 1) % 7),
    "getDayOfYear": _part(lambda moment: moment.timetuple().tm_yday - 1),
    "getHours": _part(lambda moment: moment.hour, lambda span: int(span.total_seconds() // 3600)),
    "getMinutes": _part(lambda moment: moment.minute, lambda span: int(span.total_seconds() // 60)),
    "getSeconds": _part(lambda moment: moment.second, lambda span: int(span.total_seconds())),
    "getMilliseconds": _part(lambda moment: moment.microsecond // 1000, lambda span: span.microseconds // 1000),
}
"""Every function except `default`, which is lazy, and `has`, which inspects the tree."""


def _short(value: Any) -> str:
    text = number_text(value) if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else text[:39] + "…"
