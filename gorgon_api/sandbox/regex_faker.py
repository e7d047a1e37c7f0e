"""Makes a text that a regular expression matches."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import Any

_PARSER: Any = re._parser  # type: ignore[attr-defined]
"""Python's own parser of patterns.  Private, but the same in every version that is supported (3.11 to 3.13)."""

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CATEGORIES = {
    "CATEGORY_DIGIT": "0123456789",
    "CATEGORY_SPACE": " ",
    "CATEGORY_WORD": _LETTERS + "0123456789",
    "CATEGORY_NOT_DIGIT": _LETTERS,
    "CATEGORY_NOT_SPACE": _LETTERS,
    "CATEGORY_NOT_WORD": " .-",
}
_ANY = _LETTERS + _LETTERS.upper() + "0123456789 -_.,:/@"


def matching_text(pattern: str, rng: random.Random, extra: int = 0) -> str:
    """Return a text that `pattern` most likely matches; each repetition is `extra` longer than it must be.

    Raises re.error for a broken pattern and ValueError for a construct that is not known here.  Assertions are
    ignored, so the caller checks the text.
    """
    groups: dict[int, str] = {}
    return "".join(_node(op, argument, rng, extra, groups) for op, argument in _PARSER.parse(pattern))


def _sequence(nodes: Iterable[tuple[Any, Any]], rng: random.Random, extra: int, groups: dict[int, str]) -> str:
    return "".join(_node(op, argument, rng, extra, groups) for op, argument in nodes)


def _node(op: Any, argument: Any, rng: random.Random, extra: int, groups: dict[int, str]) -> str:
    match str(op):
        case "LITERAL":
            return chr(argument)
        case "NOT_LITERAL":
            return rng.choice([char for char in _ANY if ord(char) != argument])
        case "ANY":
            return rng.choice(_LETTERS)
        case "IN":
            return _from_set(argument, rng)
        case "BRANCH":
            return _sequence(rng.choice(argument[1]), rng, extra, groups)
        case "SUBPATTERN":
            number, _, _, nodes = argument
            text = _sequence(nodes, rng, extra, groups)
            groups[number] = text
            return text
        case "ATOMIC_GROUP":
            return _sequence(argument, rng, extra, groups)
        case "MAX_REPEAT" | "MIN_REPEAT" | "POSSESSIVE_REPEAT":
            fewest, most, nodes = argument
            count = min(fewest + extra, int(most))
            return "".join(_sequence(nodes, rng, 0, groups) for _ in range(count))
        case "GROUPREF":
            return groups.get(argument, "")
        case "AT" | "ASSERT" | "ASSERT_NOT":
            return ""
        case other:
            raise ValueError(f"{other} in a pattern is not supported")


def _from_set(items: list[tuple[Any, Any]], rng: random.Random) -> str:
    """Return a character of a set such as `[a-z_]` or `[^/]`."""
    negated = str(items[0][0]) == "NEGATE"
    chars: list[str] = []
    for op, argument in items[1:] if negated else items:
        match str(op):
            case "LITERAL":
                chars.append(chr(argument))
            case "RANGE":
                chars += [chr(code) for code in range(argument[0], min(argument[1], argument[0] + 200) + 1)]
            case "CATEGORY":
                chars += _CATEGORIES.get(str(argument), "")
    if negated:
        barred = set(chars)
        chars = [char for char in _ANY if char not in barred]
    if not chars:
        raise ValueError("no character fits a set in the pattern")
    return rng.choice(chars)
