"""JSON Schema shorthand for `inputs:` and `output:`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, WithJsonSchema
from pydantic_core import InitErrorDetails

from gorgon_common.workflow.schema_base import fault, raise_all, refuse, suggest
from gorgon_common.workflow.schema_constraints import constraint_faults, nested_faults

JSON_TYPES = ("string", "integer", "number", "boolean", "array", "object", "null")

_KEYWORDS = frozenset(
    [
        "type",
        "items",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "description",
        "title",
        "default",
        "enum",
        "const",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minItems",
        "maxItems",
        "uniqueItems",
        "prefixItems",
        "contains",
        "minProperties",
        "maxProperties",
        "anyOf",
        "oneOf",
        "allOf",
        "not",
        "examples",
        "$ref",
        "$defs",
        "$schema",
        "$id",
        "$comment",
    ]
)
_SNAKE = {
    "max_items": "maxItems",
    "min_items": "minItems",
    "unique_items": "uniqueItems",
    "max_length": "maxLength",
    "min_length": "minLength",
    "min": "minimum",
    "max": "maximum",
}
_PYTHON: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
_OTHER_NAMES = {
    "list": "array",
    "str": "string",
    "text": "string",
    "int": "integer",
    "float": "number",
    "bool": "boolean",
    "dict": "object",
    "map": "object",
    "mapping": "object",
}


def _type_fault(name: Any, at: tuple[str | int, ...]) -> Iterator[InitErrorDetails]:
    names = name if isinstance(name, list) else [name]
    for one in names:
        if not isinstance(one, str) or one not in JSON_TYPES:
            meant = _OTHER_NAMES.get(str(one))
            hint = f"Did you mean `{meant}`?" if meant else suggest(str(one), JSON_TYPES)
            yield fault(f"`{one}` is not a type", *at, hint=hint, value=one)


def _fits(value: Any, schema: Mapping[str, Any]) -> bool:
    names = schema.get("type")
    if names is None:
        return True
    for name in names if isinstance(names, list) else [names]:
        kinds = _PYTHON.get(name) if isinstance(name, str) else None
        if kinds is None or (isinstance(value, kinds) and not (isinstance(value, bool) and name != "boolean")):
            return True
    return False


def _field_schema(
    value: Any, at: tuple[str | int, ...], faults: list[InitErrorDetails], *, strict: bool
) -> dict[str, Any]:
    """Return the JSON Schema of one field in shorthand, without a `required` flag of its own.

    `strict`: inner objects require all their fields by default (as in what a model is asked for).
    """
    if isinstance(value, str):
        faults.extend(_type_fault(value, at))
        return {"type": value}
    if not isinstance(value, dict):
        faults.append(fault("a type or a mapping such as {type: string} is expected here", *at, value=value))
        return {}
    made: dict[str, Any] = {}
    for key, entry in value.items():
        made |= _keyword(_SNAKE.get(str(key), str(key)), entry, (*at, key), faults, strict=strict)
    if isinstance(value.get("required"), list):
        made["required"] = value["required"]
    if "default" in made and not _fits(made["default"], made):
        message = f"the default does not fit the type `{made['type']}`"
        faults.append(fault(message, *at, "default", value=made["default"]))
    else:
        faults.extend(constraint_faults(made, at))
    return made


def _keyword(
    name: str, entry: Any, at: tuple[str | int, ...], faults: list[InitErrorDetails], *, strict: bool
) -> dict[str, Any]:
    """Return the part of the JSON Schema for one key of a field."""
    if name not in _KEYWORDS:
        hint = suggest(name, [*_KEYWORDS, *_SNAKE])
        faults.append(fault(f"unknown key `{name}` in a field's schema", *at, hint=hint, key=True))
        return {}
    match name:
        case "type":
            faults.extend(_type_fault(entry, at))
        case "items" if isinstance(entry, str | dict):
            return {name: _field_schema(entry, at, faults, strict=strict)}
        case "properties":
            if isinstance(entry, dict):
                return _properties(entry, at, faults, strict=strict)
            faults.append(fault("`properties` must be a mapping of field to type", *at, value=entry))
            return {}
        case "required":
            if not isinstance(entry, bool | list):
                faults.append(fault("`required` is true or false", *at, value=entry))
            return {}
    return {name: entry}


def _properties(
    fields: dict[str, Any], at: tuple[str | int, ...], faults: list[InitErrorDetails], *, strict: bool
) -> dict[str, Any]:
    made = {str(name): _field_schema(entry, (*at, name), faults, strict=strict) for name, entry in fields.items()}
    optional = {name for name, entry in fields.items() if isinstance(entry, dict) and entry.get("required") is False}
    schema: dict[str, Any] = {"properties": made}
    required = [name for name in made if name not in optional]
    if strict and required:
        schema["required"] = required
    elif not strict:
        marked = [name for name, entry in fields.items() if isinstance(entry, dict) and entry.get("required") is True]
        if marked:
            schema["required"] = marked
    return schema


def input_schemas(value: Any) -> Any:
    """Return input name → JSON Schema with an added `required: bool`, from the shorthand."""
    if not isinstance(value, dict):
        hint = "Write name: {type: string}, one line for each input."
        raise refuse("`inputs` must be a mapping of name to type", hint)
    faults: list[InitErrorDetails] = []
    made = {}
    for name, entry in value.items():
        schema = _field_schema(entry, (name,), faults, strict=False)
        required = isinstance(entry, dict) and entry.get("required") is True
        if isinstance(schema.get("required"), list):
            schema["x-required"] = schema.pop("required")
        if required and "default" in schema:
            hint = "An input with a default need not be given: leave `required` out, or the default."
            faults.append(fault("an input is either required or has a default", name, "required", hint=hint))
        made[name] = {**schema, "required": required}
    raise_all("inputs", faults)
    return made


def _is_full_schema(value: Mapping[str, Any]) -> bool:
    """Distinguish a JSON Schema from the shorthand `{field: type}`; a field may also be called `type` or `title`."""
    if any(key in value for key in ("$schema", "$ref", "anyOf", "oneOf", "allOf")):
        return True
    if value.get("type") not in JSON_TYPES or any(_SNAKE.get(key, key) not in _KEYWORDS for key in value):
        return False
    return not any(isinstance(entry, str) and entry in JSON_TYPES for key, entry in value.items() if key != "type")


def output_schema(value: Any) -> Any:
    """Return a JSON Schema, given as such or in the shorthand `{approved: boolean, tasks: {type: array, …}}`.

    In the shorthand every field, including those of inner objects, is required unless it says `required: false`.
    """
    if not isinstance(value, dict) or not value:
        raise refuse("`output` must be a mapping of field to type", "For example: output: {approved: boolean}")
    faults: list[InitErrorDetails] = []
    if _is_full_schema(value):
        faults.extend(_type_fault(value["type"], ("type",)) if "type" in value else ())
        faults.extend(nested_faults(value, (), value))
        raise_all("output", faults)
        return value
    made = {"type": "object", **_properties(value, (), faults, strict=True)}
    raise_all("output", faults)
    return made


_FIELD_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"enum": list(JSON_TYPES)},
        {
            "type": "object",
            "properties": {
                "type": {"anyOf": [{"enum": list(JSON_TYPES)}, {"type": "array", "items": {"enum": list(JSON_TYPES)}}]},
                "description": {"type": "string", "description": "What the field means."},
                "required": {"description": "true or false; for an inner object also a list of names."},
                "default": {"description": "The value where none is given."},
                "enum": {"type": "array", "description": "The values that are allowed."},
                "max_items": {"type": "integer", "minimum": 0, "description": "The longest list that is allowed."},
                "items": {"description": "The type of a list's items."},
                "properties": {"type": "object", "description": "The fields of an object."},
            },
        },
    ]
}
Inputs = Annotated[
    dict[str, dict[str, Any]],
    BeforeValidator(input_schemas),
    WithJsonSchema({"type": "object", "additionalProperties": _FIELD_SCHEMA}),
]
Output = Annotated[
    dict[str, Any],
    BeforeValidator(output_schema),
    WithJsonSchema({"type": "object", "minProperties": 1}),
]
