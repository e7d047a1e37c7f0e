"""The names of the language: the rules for ids, and the reserved words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_CEL_WORDS = """
    as break const continue else false for function if import in let loop package namespace null return true var void
    while
"""
_CEL_FUNCTIONS = """
    size contains startsWith endsWith matches int uint double string bool timestamp duration dyn type
    getFullYear getMonth getDate getDayOfMonth getDayOfWeek getDayOfYear getHours getMinutes getSeconds getMilliseconds
"""

CEL_WORDS = frozenset(_CEL_WORDS.split())
"""Words reserved by CEL."""

ROOTS = frozenset({"inputs", "secrets", "run", "steps", "results", "error"})
"""Names available to every expression."""

MACROS = frozenset({"has", "all", "exists", "exists_one", "map", "filter"})

OWN_FUNCTIONS = frozenset({"json", "lines", "split", "join", "truncate", "default"})

CEL_FUNCTIONS = frozenset(_CEL_FUNCTIONS.split())

FUNCTIONS = MACROS | OWN_FUNCTIONS | CEL_FUNCTIONS

RESERVED = CEL_WORDS | ROOTS | FUNCTIONS
"""Names that no step, no `as:` and no input may use."""

ID = re.compile(r"[a-z][a-z0-9_]*")


def check_id(name: str) -> str | None:
    """Return what is wrong with `name` as a step id, or None.

    An id matches `[a-z][a-z0-9_]*` and is not a word, name or function of the language.
    """
    if not ID.fullmatch(name):
        wish = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        wish = wish if ID.fullmatch(wish) else f"step_{wish}".rstrip("_")
        return f"`{name}` is not an id: ids are lower-case letters, digits and `_`, a letter first (`{wish}`)"
    if name in CEL_WORDS:
        return f"`{name}` is a reserved word of the expression language; choose another id"
    if name in ROOTS:
        return f"`{name}` already means something in expressions; choose another id"
    if name in FUNCTIONS:
        return f"`{name}` is a function of the expression language; choose another id"
    return None


def did_you_mean(name: str, known: Iterable[str], *, none: str = "") -> str:
    """Return "Did you mean `x`? Known: a, b, c." for an unknown name; `none` if there are no known names."""
    choices = sorted(set(known))
    if not choices:
        return none
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    listed = f"Known: {', '.join(choices[:20])}{', …' if len(choices) > 20 else '.'}"
    return f"Did you mean `{near[0]}`? {listed}" if near else listed
