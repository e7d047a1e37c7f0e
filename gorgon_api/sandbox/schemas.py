"""Whether a value fits a JSON Schema: the part of draft 2020-12 that replies of models use.

`format` is not checked (it is an annotation), and references reach inside the document only.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

Schema = Mapping[str, Any] | bool


def resolve_pointer(root: Schema, reference: str) -> Schema:
    """Return the target of `reference` (`#`, `#/$defs/x`, `#name`) in `root`.  Raises LookupError."""
    if not reference.startswith("#"):
        raise LookupError(f"{reference} is outside the document")
    if reference == "#":
        return root
    if not reference.startswith("#/"):
        return _find_anchor(root, reference[1:])
    node: Any = root
    for part in reference[2:].split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node  # type: ignore[no-any-return]


def _find_anchor(node: Any, name: str) -> Schema:
    """Return the schema with `$anchor: name`.  Raises LookupError."""
    pending = [node]
    while pending:
        node = pending.pop()
        if isinstance(node, Mapping):
            if node.get("$anchor") == name:
                return node
            pending.extend(node.values())
        elif isinstance(node, list):
            pending.extend(node)
    raise LookupError(f"there is no anchor {name}")


def is_type(value: Any, name: str) -> bool:
    """Return whether a JSON value is of the type that JSON Schema calls `name`."""
    match name:
        case "null":
            return value is None
        case "boolean":
            return isinstance(value, bool)
        case "integer":
            return (isinstance(value, int) and not isinstance(value, bool)) or (
                isinstance(value, float) and value.is_integer()
            )
        case "number":
            return isinstance(value, int | float) and not isinstance(value, bool)
        case "string":
            return isinstance(value, str)
        case "array":
            return isinstance(value, list)
        case "object":
            return isinstance(value, dict)
        case _:
            return False


def canonical(value: Any) -> str:
    """Return one text for equal JSON values; 1 and 1.0 are equal, 1 and true are not."""
    return json.dumps(_whole_floats(value), sort_keys=True)


def _whole_floats(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_whole_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _whole_floats(item) for key, item in value.items()}
    return value


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


def matches_pattern(pattern: str, text: str) -> bool:
    """Return whether `text` contains a match; a pattern that Python cannot read matches everything."""
    try:
        return _compiled(pattern).search(text) is not None
    except re.error:
        return True


def is_multiple(value: float, factor: float) -> bool:
    """Return whether `value` is a multiple of `factor`, as validators of JSON Schema compute it."""
    if isinstance(value, int) and isinstance(factor, int):
        return value % factor == 0
    quotient = value / factor
    return math.isfinite(quotient) and int(quotient) == quotient


def fits(schema: Schema, value: Any, root: Schema | None = None) -> bool:
    """Return whether `value` is a valid instance of `schema`; references are looked up in `root`."""
    root = schema if root is None else root
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        try:
            target = resolve_pointer(root, schema["$ref"])
        except (LookupError, ValueError, TypeError):
            return True
        if not fits(target, value, root):
            return False
    if not _fits_value(schema, value) or not _fits_combination(schema, value, root):
        return False
    if isinstance(value, str):
        return _fits_string(schema, value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _fits_number(schema, value)
    if isinstance(value, list):
        return _fits_array(schema, value, root)
    if isinstance(value, dict):
        return _fits_object(schema, value, root)
    return True


def _fits_value(schema: Mapping[str, Any], value: Any) -> bool:
    if "type" in schema:
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not any(is_type(value, name) for name in types):
            return False
    if "enum" in schema and canonical(value) not in map(canonical, schema["enum"]):
        return False
    return "const" not in schema or canonical(value) == canonical(schema["const"])


def _fits_combination(schema: Mapping[str, Any], value: Any, root: Schema) -> bool:
    if "allOf" in schema and not all(fits(part, value, root) for part in schema["allOf"]):
        return False
    if "anyOf" in schema and not any(fits(part, value, root) for part in schema["anyOf"]):
        return False
    if "oneOf" in schema and sum(fits(part, value, root) for part in schema["oneOf"]) != 1:
        return False
    if "not" in schema and fits(schema["not"], value, root):
        return False
    if "if" in schema:
        branch = "then" if fits(schema["if"], value, root) else "else"
        if branch in schema and not fits(schema[branch], value, root):
            return False
    return True


def _fits_string(schema: Mapping[str, Any], value: str) -> bool:
    return (
        len(value) >= schema.get("minLength", 0)
        and len(value) <= schema.get("maxLength", math.inf)
        and ("pattern" not in schema or matches_pattern(schema["pattern"], value))
    )


def _fits_number(schema: Mapping[str, Any], value: float) -> bool:
    return (
        value >= schema.get("minimum", -math.inf)
        and value <= schema.get("maximum", math.inf)
        and value > _exclusive(schema, "exclusiveMinimum", -math.inf)
        and value < _exclusive(schema, "exclusiveMaximum", math.inf)
        and ("multipleOf" not in schema or is_multiple(value, schema["multipleOf"]))
    )


def _exclusive(schema: Mapping[str, Any], key: str, default: float) -> float:
    """Return an exclusive bound; the booleans of draft 4 do not count."""
    bound = schema.get(key, default)
    return default if isinstance(bound, bool) else float(bound)


def array_parts(schema: Mapping[str, Any]) -> tuple[Sequence[Schema], Schema]:
    """Return the schemas of the leading items and the one of the rest, whichever draft wrote them."""
    items = schema.get("items", True)
    if isinstance(items, list):
        return items, schema.get("additionalItems", True)
    return schema.get("prefixItems", ()), items


def _fits_array(schema: Mapping[str, Any], value: list[Any], root: Schema) -> bool:
    if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf):
        return False
    prefix, rest = array_parts(schema)
    for index, item in enumerate(value):
        if not fits(prefix[index] if index < len(prefix) else rest, item, root):
            return False
    if schema.get("uniqueItems") and len({canonical(item) for item in value}) < len(value):
        return False
    if "contains" in schema:
        found = sum(fits(schema["contains"], item, root) for item in value)
        return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", math.inf))
    return True


def _fits_object(schema: Mapping[str, Any], value: dict[str, Any], root: Schema) -> bool:
    if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", math.inf):
        return False
    if any(name not in value for name in schema.get("required", ())):
        return False
    for name, item in value.items():
        if not all(fits(part, item, root) for part in property_schemas(schema, name)):
            return False
    if "propertyNames" in schema and not all(fits(schema["propertyNames"], name, root) for name in value):
        return False
    for name, needed in schema.get("dependentRequired", {}).items():
        if name in value and any(other not in value for other in needed):
            return False
    return all(fits(part, value, root) for name, part in schema.get("dependentSchemas", {}).items() if name in value)


def property_schemas(schema: Mapping[str, Any], name: str) -> list[Schema]:
    """Return every schema that the property `name` of an object has to fit."""
    own = schema.get("properties", {})
    found: list[Schema] = [own[name]] if name in own else []
    if "patternProperties" in schema:
        patterns = schema["patternProperties"]
        found += [part for pattern, part in patterns.items() if matches_pattern(pattern, name)]
    if not found and "additionalProperties" in schema:
        found.append(schema["additionalProperties"])
    return found
