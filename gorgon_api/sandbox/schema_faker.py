"""Makes a valid instance of a JSON Schema, with plausible values where a hint is known.

The walk builds an instance that fits by construction where possible; for `not`, `if` and overlapping `oneOf` it retries
with other random choices.  The same schema, hints and random source always give the same
instance.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_api.sandbox.regex_faker import matching_text
from gorgon_api.sandbox.schemas import (
    Schema,
    array_parts,
    canonical,
    fits,
    is_multiple,
    matches_pattern,
    property_schemas,
    resolve_pointer,
)

Path = tuple[str | int, ...]

MISSING: Any = object()
"""What a hint returns without a preference."""

Hint = Callable[[Path, str, Mapping[str, Any]], Any]
"""`hint(path, kind, siblings)`: a plausible value for the place, `kind` being a JSON Schema type.

For `array` it is a plausible number of items.  `siblings` holds the properties of the enclosing object that are already
chosen.
"""

ATTEMPTS = 24
DEEP = 6
HOPELESS = 40
MANY = 4000

FORMATS: dict[str, tuple[str, ...]] = {
    "date-time": ("2026-03-02T09:30:00Z", "2026-04-17T14:05:00Z"),
    "date": ("2026-03-02", "2026-04-17"),
    "time": ("09:30:00Z", "14:05:00Z"),
    "duration": ("PT1H30M", "P2D"),
    "email": ("ada@example.com", "grace@example.com"),
    "hostname": ("service.example.com", "api.example.com"),
    "ipv4": ("192.0.2.10", "192.0.2.27"),
    "ipv6": ("2001:db8::1", "2001:db8::27"),
    "uri": ("https://example.com/docs", "https://example.com/api"),
    "url": ("https://example.com/docs", "https://example.com/api"),
    "uri-reference": ("/docs", "/api"),
    "uuid": ("3f2b8c1e-5d47-4a6b-9c1d-2e8f7a90b4c3", "8a1d6e52-0c3b-4f7e-a2d9-6b5c4e3f2a10"),
    "json-pointer": ("/items/0", "/name"),
    "regex": ("^[a-z]+$", "[0-9]{2}"),
    "byte": ("U2FuZGJveA==", "R29yZ29u"),
}


class Impossible(ValueError):
    """No instance was found for this part of the schema."""


def instance(schema: Schema, rng: random.Random, hint: Hint | None = None) -> Any:
    """Return a valid instance of `schema`.  Raises Impossible where none was found in a bounded number of tries."""
    walk = _Walk(schema, rng, hint or _no_hint)
    certain = not _chancy(schema)
    last: Any = MISSING
    for attempt in range(ATTEMPTS):
        walk.loose = attempt
        walk.made = 0
        try:
            last = walk.make(schema, (), 0, {})
        except Impossible:
            continue
        if certain or fits(schema, last):
            return last
    raise Impossible("no instance of the schema was found" if last is MISSING else "the instance does not fit")


_CHANCY = frozenset(
    (
        "not",
        "if",
        "oneOf",
        "allOf",
        "contains",
        "propertyNames",
        "patternProperties",
        "dependentRequired",
        "dependentSchemas",
    )
)


def _chancy(node: Any) -> bool:
    """Return whether a schema has keywords that the walk may get wrong, so that the instance has to be checked."""
    if isinstance(node, dict):
        return not _CHANCY.isdisjoint(node) or any(map(_chancy, node.values()))
    return isinstance(node, list) and any(map(_chancy, node))


def _no_hint(path: Path, kind: str, siblings: Mapping[str, Any]) -> Any:
    return MISSING


class _Walk:
    """One walk over a schema.  `loose` counts the tries so far: from the first retry on, choices are random."""

    def __init__(self, root: Schema, rng: random.Random, hint: Hint) -> None:
        self.root = root
        self.rng = rng
        self.hint = hint
        self.loose = 0
        self.made = 0

    def make(self, schema: Schema, path: Path, depth: int, siblings: Mapping[str, Any]) -> Any:
        """Return an instance for the place `path`.  Raises Impossible."""
        self.made += 1
        if depth > HOPELESS or self.made > 20 * MANY:
            raise Impossible("the schema does not end")
        flat = self.flatten(schema, 0)
        for key in ("anyOf", "oneOf"):
            if key in flat:
                return self.choose(flat, key, path, depth, siblings)
        if "if" in flat:
            return self.conditional(flat, path, depth, siblings)
        if "const" in flat:
            return self.fitting([flat["const"]], flat)
        if "enum" in flat:
            return self.option(flat, path, siblings)
        return self.typed(flat, path, depth, siblings)

    def deep(self, depth: int) -> bool:
        """Return whether to finish: only required parts, as short as possible."""
        return depth >= DEEP or self.made > MANY

    # merging schemas

    def flatten(self, schema: Schema, hops: int) -> dict[str, Any]:
        """Follow `$ref` and fold `allOf` into one schema.  Raises Impossible."""
        if schema is True:
            return {}
        if schema is False:
            raise Impossible("nothing fits the schema false")
        if hops > 30:
            raise Impossible("the references go round in a circle")
        if "$ref" not in schema and "allOf" not in schema:
            return schema if isinstance(schema, dict) else dict(schema)
        flat = dict(schema)
        if "$ref" in flat:
            try:
                target = resolve_pointer(self.root, flat.pop("$ref"))
            except (LookupError, ValueError, TypeError):
                target = True
            flat = self.merge(self.flatten(target, hops + 1), flat)
        for part in flat.pop("allOf", ()):
            flat = self.merge(flat, self.flatten(part, hops + 1))
        return self.flatten(flat, hops + 1)

    def merge(self, left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Any]:
        """Return one schema that requires both.  Raises Impossible if they obviously conflict."""
        merged = dict(left)
        for key, value in right.items():
            merged[key] = self.merge_keyword(key, merged[key], value) if key in merged else value
        if {"additionalProperties"} & (left.keys() | right.keys()):
            self.close(merged, left, right)
        return merged

    @staticmethod
    def close(merged: dict[str, Any], left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
        """Leave out properties of one side that the other side forbids."""
        for one, other in ((left, right), (right, left)):
            if one.get("additionalProperties") is False:
                own = one.get("properties", {})
                merged["properties"] = {
                    name: part
                    for name, part in merged.get("properties", {}).items()
                    if name in own or name not in other.get("properties", {}) or property_schemas(one, name) != [False]
                }

    def merge_keyword(self, key: str, left: Any, right: Any) -> Any:
        """Return the merged value of a keyword that both sides have."""
        match key:
            case "type":
                return self.common_types(left, right)
            case "enum":
                known = {canonical(value) for value in right}
                return [value for value in left if canonical(value) in known]
            case "required":
                return list(dict.fromkeys([*left, *right]))
            case "minimum" | "exclusiveMinimum" | "minLength" | "minItems" | "minProperties":
                return max(left, right)
            case "maximum" | "exclusiveMaximum" | "maxLength" | "maxItems" | "maxProperties":
                return min(left, right)
            case "multipleOf":
                whole = isinstance(left, int) and isinstance(right, int)
                return math.lcm(left, right) if whole else max(left, right)
            case "properties" | "patternProperties" | "$defs" | "definitions":
                shared = {name: {"allOf": [left[name], right[name]]} for name in left.keys() & right.keys()}
                return {**left, **right, **shared}
            case "items" | "additionalProperties" | "contains" | "propertyNames" if not isinstance(left, list):
                return {"allOf": [left, right]} if left is not False and right is not False else False
            case "anyOf" | "oneOf":
                return [{"allOf": [a, b]} for a in left for b in right]
            case "not":
                return {"anyOf": [left, right]}
            case _:
                return right

    @staticmethod
    def common_types(left: Any, right: Any) -> list[str]:
        """Return the types that both sides allow.  Raises Impossible where there is none."""
        ours = left if isinstance(left, list) else [left]
        theirs = right if isinstance(right, list) else [right]
        common = [name for name in ours if name in theirs or (name == "integer" and "number" in theirs)]
        common += [name for name in theirs if name == "integer" and "number" in ours and name not in common]
        if not common:
            raise Impossible(f"nothing is of the types {ours} and {theirs}")
        return common

    # choices

    def choose(self, flat: dict[str, Any], key: str, path: Path, depth: int, siblings: Mapping[str, Any]) -> Any:
        """Take one branch of `anyOf` or `oneOf`.  Raises Impossible where none works."""
        rest = {name: value for name, value in flat.items() if name != key}
        branches = list(flat[key])
        if self.loose:
            self.rng.shuffle(branches)
        branches.sort(key=self.cost if self.deep(depth) else self.is_null)
        for branch in branches:
            try:
                value = self.make(self.merge(rest, self.flatten(branch, 0)), path, depth + 1, siblings)
            except Impossible:
                continue
            if key == "anyOf" or sum(fits(part, value, self.root) for part in branches) == 1:
                return value
        raise Impossible(f"no branch of {key} works")

    @staticmethod
    def is_null(schema: Schema) -> bool:
        """Return whether only null fits; such a branch is the last choice."""
        return isinstance(schema, Mapping) and schema.get("type") == "null"

    @staticmethod
    def cost(schema: Schema) -> int:
        """Return how likely the branch goes deeper: nothing for plain values, most for references."""
        if isinstance(schema, bool):
            return 0
        if "$ref" in schema:
            return 3
        kind = schema.get("type")
        if kind == "null" or "const" in schema or "enum" in schema:
            return 0
        return 2 if kind in ("object", None) else 1

    def conditional(self, flat: dict[str, Any], path: Path, depth: int, siblings: Mapping[str, Any]) -> Any:
        """Make an instance for `if`, then/else: with the condition, else without."""
        rest = {key: value for key, value in flat.items() if key not in ("if", "then", "else")}
        attempts: list[Schema] = [
            {"allOf": [rest, flat["if"], flat.get("then", True)]},
            {"allOf": [rest, flat.get("else", True)]},
        ]
        for attempt in attempts:
            try:
                value = self.make(attempt, path, depth + 1, siblings)
            except Impossible:
                continue
            if fits(flat, value, self.root):
                return value
        raise Impossible("neither side of if works")

    def fitting(self, values: Sequence[Any], flat: Mapping[str, Any]) -> Any:
        """Return the first of `values` that fits everything else.  Raises Impossible."""
        for value in values:
            if fits(flat, value, self.root):
                return value
        raise Impossible("no listed value fits")

    def option(self, flat: Mapping[str, Any], path: Path, siblings: Mapping[str, Any]) -> Any:
        """Choose from `enum`: what a hint prefers, else anything."""
        values = list(flat["enum"])
        self.rng.shuffle(values)
        values.sort(key=lambda value: value is None)
        if not self.loose:
            preferred = self.hint(path, "enum", siblings)
            if preferred is not MISSING:
                values.sort(key=lambda value: preferred.index(value) if value in preferred else len(preferred))
        return self.fitting(values, flat)

    # values by type

    def typed(self, flat: dict[str, Any], path: Path, depth: int, siblings: Mapping[str, Any]) -> Any:
        """Make a value of the first type that works, null last."""
        declared = flat.get("type") or self.implied_type(flat)
        if isinstance(declared, str) and "not" not in flat:
            return self.of_type(declared, flat, path, depth, siblings)
        kinds = list(declared) if isinstance(declared, list) else [declared]
        if self.loose:
            self.rng.shuffle(kinds)
        kinds.sort(key=lambda kind: (kind == "null") != self.deep(depth))
        for kind in kinds:
            try:
                value = self.of_type(kind, flat, path, depth, siblings)
            except Impossible:
                continue
            if "not" not in flat or not fits(flat["not"], value, self.root):
                return value
        raise Impossible(f"no value of {kinds} works")

    @staticmethod
    def implied_type(flat: Mapping[str, Any]) -> str:
        """Return the type that the keywords of a schema without `type` imply."""
        for kind, keywords in (
            ("object", ("properties", "required", "additionalProperties", "minProperties", "patternProperties")),
            ("array", ("items", "prefixItems", "minItems", "contains", "uniqueItems")),
            ("number", ("minimum", "maximum", "multipleOf", "exclusiveMinimum", "exclusiveMaximum")),
        ):
            if any(keyword in flat for keyword in keywords):
                return kind
        return "string"

    def of_type(self, kind: str, flat: dict[str, Any], path: Path, depth: int, siblings: Mapping[str, Any]) -> Any:
        """Make a value of one type.  Raises Impossible."""
        match kind:
            case "null":
                return None
            case "boolean":
                hinted = self.hinted(path, kind, siblings)
                return bool(hinted) if hinted is not MISSING else self.rng.random() < 0.5
            case "integer" | "number":
                return self.number(kind, flat, path, siblings)
            case "string":
                return self.string(flat, path, siblings)
            case "array":
                return self.array(flat, path, depth, siblings)
            case "object":
                return self.object(flat, path, depth)
            case _:
                raise Impossible(f"{kind} is no type")

    def hinted(self, path: Path, kind: str, siblings: Mapping[str, Any]) -> Any:
        """Return the hint's value; on retries only sometimes, because it may not fit."""
        return MISSING if self.loose > 1 else self.hint(path, kind, siblings)

    def number(self, kind: str, flat: Mapping[str, Any], path: Path, siblings: Mapping[str, Any]) -> float:
        """Make a number within its bounds, rounded where that still fits."""
        low, high = self.bounds(flat)
        if low > high:
            raise Impossible("no number lies between the bounds")
        constraints = {key: value for key, value in flat.items() if key != "type"}
        constraints["type"] = kind
        factor = flat.get("multipleOf")
        if factor:
            return self.multiple(constraints, factor, low, high)
        wanted = self.hinted(path, kind, siblings)
        span = (low, high) if math.isfinite(low) and math.isfinite(high) else self.half_open(low, high)
        if wanted is MISSING:
            wanted = self.rng.uniform(*span)
        elif isinstance(wanted, tuple):
            wanted = self.scaled(wanted, low, high)
        candidates: list[float] = []
        if kind == "integer":
            candidates = [round(wanted), math.ceil(low) if math.isfinite(low) else 0]
            candidates += [math.floor(high) if math.isfinite(high) else 0, math.floor(span[0]) + 1]
        else:
            candidates = [round(wanted, 2), wanted, *span, (span[0] + span[1]) / 2, math.nextafter(low, math.inf)]
        return float(value) if isinstance(value := self.fitting(candidates, constraints), float) else value

    @staticmethod
    def bounds(flat: Mapping[str, Any]) -> tuple[float, float]:
        """Return the bounds, treating exclusive ones as inclusive; a value on them is rejected later."""
        lows = [flat.get("minimum"), flat.get("exclusiveMinimum")]
        highs = [flat.get("maximum"), flat.get("exclusiveMaximum")]
        low = max((x for x in lows if x is not None and not isinstance(x, bool)), default=-math.inf)
        high = min((x for x in highs if x is not None and not isinstance(x, bool)), default=math.inf)
        return low, high

    @staticmethod
    def half_open(low: float, high: float) -> tuple[float, float]:
        """Return a modest range where a side is open."""
        if math.isfinite(low):
            return low, low + 10
        if math.isfinite(high):
            return high - 10, high
        return 1, 10

    @staticmethod
    def scaled(wanted: tuple[float, float], low: float, high: float) -> float:
        """Return a value for (share of the range, value without a range)."""
        share, plain = wanted
        return low + share * (high - low) if math.isfinite(low) and math.isfinite(high) else plain

    def multiple(self, flat: Mapping[str, Any], factor: float, low: float, high: float) -> float:
        """Return a multiple of `factor` within the bounds."""
        first = (
            math.ceil(low / factor)
            if math.isfinite(low)
            else min(1, math.floor(high / factor))
            if math.isfinite(high)
            else 1
        )
        steps = [first + step for step in range(200)] + [first - step for step in range(1, 5)]
        for step in steps:
            value: float = step * factor
            if flat["type"] == "integer" and isinstance(value, float):
                if not value.is_integer():
                    continue
                value = int(value)
            if is_multiple(value, factor) and fits(flat, value, self.root):
                return value
        raise Impossible("no multiple lies between the bounds")

    def string(self, flat: Mapping[str, Any], path: Path, siblings: Mapping[str, Any]) -> str:
        """Make a string for its pattern, format, length or, best, its meaning."""
        shortest, longest = int(flat.get("minLength", 0)), flat.get("maxLength", math.inf)
        if shortest > longest:
            raise Impossible("minLength is above maxLength")
        wanted = self.hinted(path, "string", siblings)
        text = str(wanted) if wanted is not MISSING else f"{path[-1] if path else 'text'} {self.rng.randrange(100)}"
        if shortest <= len(text) <= longest and "pattern" not in flat and "format" not in flat:
            return text
        if "pattern" in flat:
            if fits({**flat, "type": "string"}, text, self.root):
                return text
            return self.by_pattern(flat, shortest)
        if flat.get("format") in FORMATS:
            text = self.rng.choice(FORMATS[flat["format"]])
        if len(text) > longest:
            text = text[: int(longest)].rstrip() or text[: int(longest)]
        while len(text) < shortest:
            text += ("." if text and not text.endswith((".", " ")) else "") + " It was checked."
            text = text[: max(shortest, 1)] if len(text) > longest else text
        return text

    def by_pattern(self, flat: Mapping[str, Any], shortest: int) -> str:
        """Return a text that the pattern matches and the lengths allow.  Raises Impossible."""
        for extra in range(max(shortest + 1, 8)):
            try:
                text = matching_text(flat["pattern"], self.rng, extra)
            except (ValueError, re.error) as error:
                raise Impossible(str(error)) from error
            if fits({**flat, "type": "string"}, text, self.root):
                return text
        raise Impossible("no text was found for the pattern")

    def array(self, flat: Mapping[str, Any], path: Path, depth: int, siblings: Mapping[str, Any]) -> list[Any]:
        """Make an array: the leading items, what it must contain, then as many of the rest as look right."""
        fewest, most = int(flat.get("minItems", 0)), flat.get("maxItems", math.inf)
        prefix, rest = array_parts(flat)
        if "contains" in flat:
            fewest = max(fewest, len(prefix) + int(flat.get("minContains", 1)))
        wanted = self.hinted(path, "array", siblings)
        count = 0 if self.deep(depth) else wanted if wanted is not MISSING else self.rng.randint(1, 3)
        count = int(min(max(count, fewest, 0 if self.deep(depth) else min(len(prefix), most)), most))
        if rest is False:
            count = min(count, len(prefix))
        made: list[Any] = []
        seen: set[str] = set()
        for index in range(count):
            schema = prefix[index] if index < len(prefix) else rest
            if "contains" in flat and len(prefix) <= index < len(prefix) + flat.get("minContains", 1):
                schema = {"allOf": [schema, flat["contains"]]}
            try:
                item = self.item(schema, (*path, index), depth, siblings, seen if flat.get("uniqueItems") else None)
            except Impossible:
                if index < fewest:
                    raise
                break
            made.append(item)
        if len(made) < fewest:
            raise Impossible("too few items can be made")
        return made

    def item(self, schema: Schema, path: Path, depth: int, siblings: Mapping[str, Any], seen: set[str] | None) -> Any:
        """Make one item, unlike those in `seen`.  Raises Impossible."""
        if seen is None:
            return self.make(schema, path, depth + 1, siblings)
        before = self.loose
        try:
            for attempt in range(40):
                value = self.make(schema, path, depth + 1, siblings)
                if canonical(value) not in seen:
                    seen.add(canonical(value))
                    return value
                self.loose = max(before, attempt + 1)
        finally:
            self.loose = before
        raise Impossible("no further item differs from the others")

    def object(self, flat: Mapping[str, Any], path: Path, depth: int) -> dict[str, Any]:
        """Make an object with every required property and, unless it goes deep, the optional ones."""
        required = list(flat.get("required", ()))
        names = list(flat.get("properties", {}))
        names += [name for name in required if name not in names]
        most = flat.get("maxProperties", math.inf)
        room = most - len(required)
        made: dict[str, Any] = {}
        for name in names:
            needed = name in required
            if not needed and (self.deep(depth) or room <= 0):
                continue
            try:
                made[name] = self.property(flat, name, path, depth, made)
            except Impossible:
                if needed:
                    raise
                continue
            room -= 0 if needed else 1
        self.add_dependent(flat, path, depth, made)
        self.add_extra(flat, path, depth, made)
        return made

    def property(self, flat: Mapping[str, Any], name: str, path: Path, depth: int, made: Mapping[str, Any]) -> Any:
        """Make the property `name`."""
        parts = property_schemas(flat, name)
        schema = parts[0] if len(parts) == 1 else {"allOf": parts}
        return self.make(schema, (*path, name), depth + 1, made)

    def add_dependent(self, flat: Mapping[str, Any], path: Path, depth: int, made: dict[str, Any]) -> None:
        """Add properties that others require, or omit those that require too much."""
        for name, needed in flat.get("dependentRequired", {}).items():
            for other in needed:
                if name in made and other not in made:
                    made[other] = self.property(flat, other, path, depth, made)

    def add_extra(self, flat: Mapping[str, Any], path: Path, depth: int, made: dict[str, Any]) -> None:
        """Add properties of free names: as many as are needed, two where an object is a mapping."""
        fewest = int(flat.get("minProperties", 0))
        free = flat.get("additionalProperties", True)
        mapping = isinstance(free, Mapping) and not flat.get("properties") and not self.deep(depth)
        fewest = max(fewest, int(min(2, flat.get("maxProperties", 2))) if mapping else 0)
        for number in range(1, 200):
            if len(made) >= fewest:
                return
            name = self.free_name(flat, number, path)
            if name not in made:
                made[name] = self.property(flat, name, path, depth, made)
        raise Impossible("no name is left for another property")

    def free_name(self, flat: Mapping[str, Any], number: int, path: Path) -> str:
        """Return a name for a further property.  Raises Impossible."""
        if "propertyNames" in flat:
            name = self.make({"allOf": [{"type": "string"}, flat["propertyNames"]]}, (), DEEP, {})
            return str(name)
        if flat.get("additionalProperties", True) is False:
            for pattern in flat.get("patternProperties", {}):
                name = matching_text(pattern, self.rng, number % 6)
                return f"{name}{number}" if matches_pattern(pattern, f"{name}{number}") else name
            raise Impossible("no further property is allowed")
        stem = str(path[-1]).rstrip("s") if path and isinstance(path[-1], str) else "item"
        return f"{stem}_{number}"


def wrong_instance(schema: Schema, rng: random.Random, hint: Hint | None = None) -> Any:
    """Return a value that does not fit `schema`: the right one with a property missing, or another type altogether."""
    try:
        value = instance(schema, rng, hint)
    except Impossible:
        value = {}
    if isinstance(value, dict) and isinstance(schema, Mapping):
        for name in reversed(list(value)):
            without = {key: item for key, item in value.items() if key != name}
            if not fits(schema, without):
                return without
    others: tuple[Any, ...] = ({"unexpected": True}, [], "unexpected", 17, None)
    for other in others:
        if not fits(schema, other):
            return other
    return value
