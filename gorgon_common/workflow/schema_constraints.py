"""Checks the constraints of a field's schema against each other: what can never be met is refused before a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic_core import InitErrorDetails

from gorgon_common import lazy
from gorgon_common.workflow.schema_base import fault

At = tuple[str | int, ...]

_BOUNDS = (("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems"))
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_CONSTRAINTS = frozenset({"enum", "const", "pattern", "multipleOf", *(name for pair in _BOUNDS for name in pair)})


def constraint_faults(schema: Mapping[str, Any], at: At) -> Iterator[InitErrorDetails]:
    """Yield what is wrong with the constraints of one field and with its default, not of the fields inside it."""
    before = list(_own_faults(schema, at))
    yield from before
    if "default" in schema and not before and _CONSTRAINTS & set(schema):
        for error in lazy.load("jsonschema:Draft202012Validator")(schema).iter_errors(schema["default"]):
            yield fault(f"the default does not fit: {error.message}", *at, "default", value=schema["default"])
            return


def nested_faults(schema: Any, at: At, root: Mapping[str, Any]) -> Iterator[InitErrorDetails]:
    """Yield what is wrong with the constraints in a whole JSON Schema, and its references that lead nowhere."""
    if isinstance(schema, list):
        for number, entry in enumerate(schema):
            yield from nested_faults(entry, (*at, number), root)
    if not isinstance(schema, dict):
        return
    yield from _own_faults(schema, at)
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#") and not _leads_somewhere(target, root):
        yield fault(f"`{target}` is not in this schema", *at, "$ref", value=target)
    for name, entry in schema.items():
        if name in ("properties", "patternProperties", "$defs") and isinstance(entry, dict):
            for field, inner in entry.items():
                yield from nested_faults(inner, (*at, name, field), root)
        elif name not in ("default", "enum", "const", "examples"):
            yield from nested_faults(entry, (*at, name), root)


def _own_faults(schema: Mapping[str, Any], at: At) -> Iterator[InitErrorDetails]:
    pattern = schema.get("pattern")
    if pattern is not None:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            hint = "Write a regular expression; a character such as ( is escaped with a backslash."
            yield fault(f"the pattern cannot be read: {error}", *at, "pattern", hint=hint, value=pattern)
    values = schema.get("enum")
    if values is not None and (not isinstance(values, list) or not values):
        yield fault("`enum` must be a list with at least one value", *at, "enum", value=values)
    for name in _COUNTS:
        if name in schema and (isinstance(schema[name], bool) or not isinstance(schema[name], int) or schema[name] < 0):
            yield fault(f"`{name}` must be a whole number, 0 or more", *at, value=schema[name])
            return
    for name in ("minimum", "maximum"):
        if name in schema and (isinstance(schema[name], bool) or not isinstance(schema[name], int | float)):
            yield fault(f"`{name}` must be a number", *at, value=schema[name])
            return
    for low, high in _BOUNDS:
        if low in schema and high in schema and schema[low] > schema[high]:
            yield fault(f"no value fits: `{low}` {schema[low]} is above `{high}` {schema[high]}", *at)


def _leads_somewhere(target: str, root: Mapping[str, Any]) -> bool:
    found: Any = root
    for part in target.removeprefix("#").split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isdecimal() and int(key) < len(found):
            found = found[int(key)]
        else:
            return False
    return target == "#" or target.startswith("#/")
