"""Translates JSON Schemas to the subset of the providers' structured output, and their replies back.

Both require closed objects (`additionalProperties: false`) and reject some keywords; for OpenAI every property must be
required.  The translation may lose constraints, but the reply is validated against the original schema.

- Local `$ref`s are inlined; `oneOf` and lists of types become `anyOf`; an `allOf` of one is unwrapped.
- Constraints that a provider does not accept (`minLength`, `maximum`, …) move into the description, where the model
  reads them.
- OpenAI: an optional property becomes required and nullable; `restore` drops such a null again.
- A root that is not an object is wrapped in `{"value": …}`; `restore` unwraps it.
- What cannot be expressed (free-form objects, recursion, `allOf` of several, `not`, …) has no native form: `native` is
  None, and the adapter describes the schema in the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gorgon_common import strict_json

WRAPPED = "value"
"""The property that holds a reply whose schema is not an object."""

_MAX_DEPTH = 32
_ANNOTATIONS = frozenset(
    {
        "$schema",
        "$id",
        "$comment",
        "$anchor",
        "$defs",
        "definitions",
        "title",
        "default",
        "examples",
        "example",
        "deprecated",
        "readOnly",
        "writeOnly",
        "additionalProperties",
    }
)
_CANNOT = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "patternProperties",
        "propertyNames",
        "unevaluatedProperties",
        "prefixItems",
        "contains",
        "$dynamicRef",
        "$recursiveRef",
    }
)
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "uri", "ipv4", "ipv6", "uuid"})
_STRUCTURE = frozenset(
    {"type", "properties", "required", "items", "anyOf", "oneOf", "allOf", "enum", "const", "description", "$ref"}
)
_OPENAI_TAKES = frozenset(
    {"pattern", "multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems"}
)


class _NoNativeForm(Exception):
    """The subset cannot express the schema."""


@dataclass(frozen=True, slots=True)
class Form:
    """A schema prepared for one provider.

    `native` is what the API gets, None where there is no native form.  `wrapped`: the reply is `{"value": …}`.
    """

    native: dict[str, Any] | None
    wrapped: bool
    original: Mapping[str, Any]

    def restore(self, data: Any) -> Any:
        """Return the reply in the form of the original schema: unwrapped, without the nulls of optional fields."""
        if self.native is None:
            return data
        if self.wrapped:
            data = data.get(WRAPPED, data) if isinstance(data, dict) else data
        return _without_nulls(data, self.original, self.original)


def openai_form(schema: Mapping[str, Any]) -> Form:
    """Return the schema in the strict subset of OpenAI."""
    return _form(schema, all_required=True, taken=_OPENAI_TAKES)


def anthropic_form(schema: Mapping[str, Any]) -> Form:
    """Return the schema in the subset of Anthropic."""
    return _form(schema, all_required=False, taken=frozenset())


def in_words(schema: Mapping[str, Any]) -> str:
    """Return the instruction for a reply of this schema, if there is no native form."""
    return (
        "Answer with one JSON value and nothing else: no explanation, no Markdown fence. It must be valid against this "
        f"JSON Schema:\n{json.dumps(schema, ensure_ascii=False)}"
    )


def read_json(text: str) -> Any:
    """Parse a reply, within a Markdown fence too; None where it is not JSON that can be used."""
    stripped = text.strip()
    if stripped.startswith("```") and stripped.endswith("```") and "\n" in stripped:
        stripped = stripped[stripped.index("\n") : -3]
    try:
        return strict_json.loads(stripped)
    except ValueError:
        return None


def _form(schema: Mapping[str, Any], *, all_required: bool, taken: frozenset[str]) -> Form:
    converter = _Converter(schema, all_required, taken)
    try:
        native = converter.convert(schema, 0)
    except _NoNativeForm:
        return Form(None, False, schema)
    wrapped = native.get("type") != "object"
    if wrapped:
        native = _closed({WRAPPED: native}, [WRAPPED])
    return Form(native, wrapped, schema)


class _Converter:
    def __init__(self, root: Mapping[str, Any], all_required: bool, taken: frozenset[str]) -> None:
        self._root = root
        self._all_required = all_required
        self._taken = taken

    def convert(self, schema: Any, depth: int) -> dict[str, Any]:
        if depth > _MAX_DEPTH or not isinstance(schema, Mapping):
            raise _NoNativeForm  # too deep is most often a recursion; `true` and `false` are no objects
        schema = _resolved(schema, self._root)
        if _CANNOT & schema.keys():
            raise _NoNativeForm
        made = self._shape(schema, depth)
        return self._described(made, schema)

    def _shape(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        if "const" in schema:
            return {"type": _type_of(schema["const"]), "enum": [schema["const"]]}
        if "enum" in schema:
            return self._enumeration(schema["enum"])
        variants = schema.get("anyOf") or schema.get("oneOf")
        kind = schema.get("type")
        if variants:
            if "properties" in schema or "items" in schema:
                raise _NoNativeForm
            return {"anyOf": [self.convert(variant, depth + 1) for variant in variants]}
        if isinstance(kind, list):
            return {"anyOf": [self.convert({**schema, "type": one, "description": ""}, depth + 1) for one in kind]}
        if kind == "object" or (kind is None and "properties" in schema):
            return self._object(schema, depth)
        if kind == "array":
            return {"type": "array", "items": self.convert(schema.get("items"), depth + 1)}
        if kind in ("string", "number", "integer", "boolean", "null"):
            return {"type": kind}
        raise _NoNativeForm

    @staticmethod
    def _enumeration(values: Any) -> dict[str, Any]:
        kinds = {_type_of(value) for value in values}
        if len(kinds) == 1:
            return {"type": kinds.pop(), "enum": list(values)}
        return {"anyOf": [{"type": kind, "enum": [v for v in values if _type_of(v) == kind]} for kind in sorted(kinds)]}

    def _object(self, schema: Mapping[str, Any], depth: int) -> dict[str, Any]:
        properties = schema.get("properties") or {}
        extra = schema.get("additionalProperties")
        if isinstance(extra, Mapping) or (not properties and extra is not False):
            raise _NoNativeForm  # a map, or an object that may hold anything
        required = set(schema.get("required") or ())
        if not required <= properties.keys():
            raise _NoNativeForm
        made = {}
        for name, entry in properties.items():
            converted = self.convert(entry, depth + 1)
            if self._all_required and name not in required and not _allows_null(entry, self._root):
                converted = _nullable(converted)
            made[name] = converted
        return _closed(made, [name for name in properties if self._all_required or name in required])

    def _described(self, made: dict[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
        described = [str(schema["description"])] if schema.get("description") else []
        lost = {}
        for name, value in schema.items():
            if name in _STRUCTURE or name in _ANNOTATIONS:
                continue
            if "anyOf" in made and isinstance(schema.get("type"), list):
                continue  # each variant says it
            if name in self._taken or (name == "format" and value in _FORMATS):
                made[name] = value
            else:
                lost[name] = value
        if lost:
            described.append(json.dumps(lost, ensure_ascii=False))
        if described:
            made["description"] = " ".join(described)
        return made


def _closed(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _nullable(schema: dict[str, Any]) -> dict[str, Any]:
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]}


def _type_of(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    for kind, name in ((str, "string"), (int, "integer"), (float, "number")):
        if isinstance(value, kind):
            return name
    raise _NoNativeForm


def _resolved(schema: Mapping[str, Any], root: Mapping[str, Any]) -> Mapping[str, Any]:
    """Follow `$ref` and unwrap an `allOf` of one; what stands beside them goes before what they bring."""
    for _ in range(_MAX_DEPTH):
        if "$ref" in schema:
            rest = {name: value for name, value in schema.items() if name != "$ref"}
            schema = {**_target(str(schema["$ref"]), root), **rest}
        elif len(schema.get("allOf") or ()) == 1:
            rest = {name: value for name, value in schema.items() if name != "allOf"}
            schema = {**schema["allOf"][0], **rest}
        elif schema.get("allOf"):
            raise _NoNativeForm
        else:
            return schema
    raise _NoNativeForm


def _target(reference: str, root: Mapping[str, Any]) -> Mapping[str, Any]:
    if not reference.startswith("#"):
        raise _NoNativeForm
    found: Any = root
    for part in reference[1:].split("/")[1:]:
        part = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or part not in found:
            raise _NoNativeForm
        found = found[part]
    if not isinstance(found, Mapping):
        raise _NoNativeForm
    return found


def _allows_null(schema: Any, root: Mapping[str, Any]) -> bool:
    if not isinstance(schema, Mapping):
        return bool(schema)
    schema = _resolved(schema, root)
    if "const" in schema:
        return schema["const"] is None
    if "enum" in schema:
        return None in schema["enum"]
    variants = schema.get("anyOf") or schema.get("oneOf")
    if variants:
        return any(_allows_null(variant, root) for variant in variants)
    kind = schema.get("type")
    return kind is None or "null" in (kind if isinstance(kind, list) else [kind])


def _without_nulls(data: Any, schema: Any, root: Mapping[str, Any]) -> Any:
    """Remove the nulls that only `all_required` introduced."""
    if not isinstance(schema, Mapping):
        return data
    schema = _resolved(schema, root)
    variants = schema.get("anyOf") or schema.get("oneOf")
    if variants:
        fitting = [variant for variant in variants if _may_be(data, variant, root)]
        return _without_nulls(data, fitting[0], root) if fitting else data
    if isinstance(data, list):
        return [_without_nulls(item, schema.get("items"), root) for item in data]
    if not isinstance(data, dict):
        return data
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    return {
        name: _without_nulls(value, properties.get(name), root)
        for name, value in data.items()
        if not (
            value is None and name in properties and name not in required and not _allows_null(properties[name], root)
        )
    }


def _may_be(data: Any, schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether this variant of an `anyOf` is meant: the kind of value, an object's names and its constants."""
    if not isinstance(schema, Mapping):
        return False
    schema = _resolved(schema, root)
    if not isinstance(data, dict):
        return isinstance(data, list) and schema.get("type") == "array"
    properties = schema.get("properties") or {}
    if not data.keys() <= properties.keys() or not set(schema.get("required") or ()) <= data.keys():
        return False
    entries = [(data[name], entry) for name, entry in properties.items() if name in data and isinstance(entry, Mapping)]
    return all(value == entry.get("const", value) and value in entry.get("enum", [value]) for value, entry in entries)
