"""JSON Schemas in the providers' subsets: what goes out, and that what comes back means the same as before."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gorgon_common.roles.catalogue import load_roles
from gorgon_worker.providers.schemas import Form, anthropic_form, in_words, openai_form, read_json

FORMS = [pytest.param(openai_form, id="openai"), pytest.param(anthropic_form, id="anthropic")]


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


STRING = {"type": "string"}
NULL = {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "openai", "anthropic"),
    [
        ({"type": "object", "properties": {"a": STRING}, "required": ["a"]}, closed(a=STRING), closed(a=STRING)),
        (
            {"type": "object", "properties": {"a": STRING}},
            closed(a={"anyOf": [STRING, NULL]}),
            {**closed(a=STRING), "required": []},
        ),
        (
            closed(n={"type": "integer", "minimum": 1, "description": "How many"}),
            closed(n={"type": "integer", "minimum": 1, "description": "How many"}),
            closed(n={"type": "integer", "description": 'How many {"minimum": 1}'}),
        ),
        (
            closed(s={"type": "string", "minLength": 3}),
            closed(s={"type": "string", "description": '{"minLength": 3}'}),
            closed(s={"type": "string", "description": '{"minLength": 3}'}),
        ),
        (closed(s={"type": ["string", "null"]}),) + (closed(s={"anyOf": [STRING, NULL]}),) * 2,
        (closed(s={"oneOf": [STRING, {"type": "number"}]}),) + (closed(s={"anyOf": [STRING, {"type": "number"}]}),) * 2,
        (closed(k={"const": "x"}),) + (closed(k={"type": "string", "enum": ["x"]}),) * 2,
        (
            closed(k={"enum": ["x", 1, None]}),
            *(
                closed(
                    k={
                        "anyOf": [
                            {"type": "integer", "enum": [1]},
                            {"type": "null", "enum": [None]},
                            {"type": "string", "enum": ["x"]},
                        ]
                    }
                ),
            )
            * 2,
        ),
        (
            {
                **closed(a={"$ref": "#/$defs/name", "description": "Theirs"}),
                "$defs": {"name": {**STRING, "title": "Name"}},
            },
            *(closed(a={**STRING, "description": "Theirs"}),) * 2,
        ),
        (closed(a={"allOf": [STRING]}),) + (closed(a=STRING),) * 2,
        ({"type": "array", "items": STRING},) + (closed(value={"type": "array", "items": STRING}),) * 2,
    ],
)
def test_forms(schema: dict[str, Any], openai: dict[str, Any], anthropic: dict[str, Any]) -> None:
    assert openai_form(schema).native == openai
    assert anthropic_form(schema).native == anthropic


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object"},
        {"type": "object", "additionalProperties": STRING},
        {"type": "object", "properties": {"a": STRING}, "additionalProperties": {"type": "integer"}},
        {"type": "object", "properties": {"a": {}}},
        {"type": "object", "properties": {"a": True}},
        {"type": "array"},
        {"type": "object", "properties": {"a": {"not": STRING}}},
        {"type": "object", "properties": {"a": {"allOf": [STRING, {"minLength": 1}]}}},
        {"type": "object", "properties": {"a": {"$ref": "https://example.invalid/x"}}},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/missing"}}},
        {"type": "object", "properties": {"child": {"$ref": "#"}}},
        {"type": "object", "properties": {"a": STRING}, "required": ["b"]},
        {"type": "object", "properties": {"a": {"enum": [{"b": 1}]}}},
        {"anyOf": [STRING], "properties": {"a": STRING}},
        {},
    ],
)
def test_what_has_no_native_form(form: Any, schema: dict[str, Any]) -> None:
    made = form(schema)
    assert made.native is None
    assert made.restore({"anything": None}) == {"anything": None}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("role", sorted(load_roles()))
def test_every_role_has_a_native_form(form: Any, role: str) -> None:
    made = form(load_roles()[role].output_schema)
    assert made.native is not None
    assert not made.wrapped


@pytest.mark.parametrize(
    ("schema", "said", "meant"),
    [
        ({"type": "object", "properties": {"a": STRING}}, {"a": None}, {}),
        ({"type": "object", "properties": {"a": STRING}, "required": ["a"]}, {"a": None}, {"a": None}),
        ({"type": "object", "properties": {"a": {"type": ["string", "null"]}}}, {"a": None}, {"a": None}),
        ({"type": "object", "properties": {"a": {"enum": ["x", None]}}}, {"a": None}, {"a": None}),
        (
            {"type": "array", "items": {"type": "object", "properties": {"a": STRING}}},
            {"value": [{"a": None}, {"a": "x"}]},
            [{}, {"a": "x"}],
        ),
        ({"type": "string"}, {"value": "x"}, "x"),
        ({"type": "string"}, "not wrapped", "not wrapped"),
        (
            {
                "type": "object",
                "properties": {
                    "shape": {
                        "anyOf": [
                            {
                                "type": "object",
                                "properties": {"kind": {"const": "a"}, "x": STRING},
                                "required": ["kind"],
                            },
                            {
                                "type": "object",
                                "properties": {"kind": {"const": "b"}, "x": {"type": ["string", "null"]}},
                                "required": ["kind"],
                            },
                        ]
                    }
                },
            },
            {"shape": {"kind": "b", "x": None}},
            {"shape": {"kind": "b", "x": None}},
        ),
        ({"type": "object", "properties": {"a": STRING}}, None, None),
        ({"type": "object", "properties": {"a": STRING}}, ["wrong"], ["wrong"]),
    ],
)
def test_restore(schema: dict[str, Any], said: Any, meant: Any) -> None:
    assert openai_form(schema).restore(said) == meant


LEAVES = st.sampled_from(
    [STRING, {"type": "integer"}, {"type": "boolean"}, NULL, {"type": ["string", "null"]}, {"enum": ["x", "y"]}]
)


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from("abcd"), inner, min_size=1, max_size=4).flatmap(
        lambda properties: st.lists(st.sampled_from(sorted(properties)), unique=True).map(
            lambda required: {"type": "object", "properties": properties, "required": required}
        )
    )


SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(_objects(inner), inner.map(lambda item: {"type": "array", "items": item})),
    max_leaves=8,
)


def _instance(draw: st.DrawFn, schema: Any) -> Any:
    """A value of this schema: required properties, some of the others."""
    if "enum" in schema:
        return draw(st.sampled_from(schema["enum"]))
    kind = schema["type"]
    if isinstance(kind, list):
        kind = draw(st.sampled_from(kind))
    if kind == "array":
        return [_instance(draw, schema["items"]) for _ in range(draw(st.integers(0, 2)))]
    if kind == "object":
        return {
            name: _instance(draw, entry)
            for name, entry in schema["properties"].items()
            if name in schema["required"] or draw(st.booleans())
        }
    return {"string": "text", "integer": 3, "boolean": True, "null": None}[kind]


def _strictly(value: Any, schema: Any) -> Any:
    """What a model in strict mode would say for `value`: every property there, null for what is missing."""
    if isinstance(value, list):
        return [_strictly(item, schema["items"]) for item in value]
    if isinstance(value, dict):
        return {
            name: _strictly(value[name], entry) if name in value else None
            for name, entry in schema["properties"].items()
        }
    return value


@given(st.data())
def test_a_reply_in_the_subset_means_what_the_original_says(data: st.DataObject) -> None:
    schema = data.draw(SCHEMAS)
    value = data.draw(st.composite(_instance)(schema))
    assert Draft202012Validator(schema).is_valid(value)

    form: Form = openai_form(schema)
    assert form.native is not None
    said = _strictly(value, schema)
    said = {"value": said} if form.wrapped else said
    assert Draft202012Validator(form.native).is_valid(said), "strict mode could not have said this"
    restored = form.restore(said)
    assert Draft202012Validator(schema).is_valid(restored)

    looser = anthropic_form(schema)
    assert looser.native is not None
    plain = {"value": value} if looser.wrapped else value
    assert Draft202012Validator(looser.native).is_valid(plain)
    assert looser.restore(plain) == value


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ('{"a": 1}', {"a": 1}),
        ('```json\n{"a": 1}\n```', {"a": 1}),
        ("  [1]\n", [1]),
        ("```\n[1]\n```\n", [1]),
        ("Here it is: {}", None),
        ("", None),
        ("```", None),
    ],
)
def test_read_json(text: str, data: Any) -> None:
    assert read_json(text) == data


def test_the_schema_in_words_is_the_schema() -> None:
    assert '{"type": "object"}' in in_words({"type": "object"})
