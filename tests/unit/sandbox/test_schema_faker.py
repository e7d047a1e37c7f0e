"""Instances of JSON Schemas: always valid, always the same for the same choice of the random source."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from gorgon_api.sandbox.regex_faker import matching_text
from gorgon_api.sandbox.replies import Hints, Topic
from gorgon_api.sandbox.schema_faker import Impossible, instance, wrong_instance
from gorgon_api.sandbox.schemas import fits

NAMES = ("id", "title", "tasks", "approved", "score", "depends_on", "status", "value", "findings", "note")
PATTERNS = (r"^[a-z]{3}-\d{2,4}$", r"\d+", r"^(low|high)$", r"^[^/]+/[a-z_]+$", r"^v\d+\.\d+$", r"a|bb", r"^(ab)+$")

everyday = settings(max_examples=300, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])


def bounds(low: str, high: str, smallest: int, largest: int) -> st.SearchStrategy[dict[str, int]]:
    """A lower bound, an upper bound, both in order, or neither."""
    pair = st.tuples(st.integers(smallest, largest), st.integers(smallest, largest)).map(sorted)
    return st.one_of(
        st.just({}),
        st.integers(smallest, largest).map(lambda x: {low: x}),
        st.integers(smallest, largest).map(lambda x: {high: x}),
        pair.map(lambda found: {low: found[0], high: found[1]}),
    )


def joined(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*parts).map(lambda dicts: {key: value for part in dicts for key, value in part.items()})


def of(kind: str, *parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return joined(st.just({"type": kind}), *parts)


strings = st.one_of(
    of("string", bounds("minLength", "maxLength", 0, 60)),
    of("string", st.sampled_from(PATTERNS).map(lambda pattern: {"pattern": pattern})),
    of("string", st.sampled_from(["date-time", "email", "uuid", "uri", "odd"]).map(lambda name: {"format": name})),
)
numbers = st.one_of(
    of("integer", bounds("minimum", "maximum", -50, 50)),
    of("number", bounds("minimum", "maximum", -50, 50)),
    of("integer", st.integers(1, 12).map(lambda x: {"multipleOf": x}), bounds("minimum", "maximum", -40, 40)).filter(
        lambda s: s.get("maximum", 99) - s.get("minimum", -99) >= s["multipleOf"]
    ),
    of("number", st.sampled_from([0.5, 0.25, 0.1, 2]).map(lambda x: {"multipleOf": x})),
    st.just({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}),
    st.just({"type": "integer", "exclusiveMinimum": 3, "maximum": 4}),
)
plain = st.one_of(
    strings,
    numbers,
    st.just({"type": "boolean"}),
    st.just({"type": "null"}),
    st.just({}),
    st.just(True),
    st.just({"type": ["null", "string"]}),
    st.lists(st.one_of(st.integers(), st.text(max_size=5), st.none(), st.booleans()), min_size=1, max_size=4).map(
        lambda values: {"enum": values}
    ),
    st.integers(0, 9).map(lambda value: {"const": value}),
    st.just({"$ref": "#/$defs/tree"}),
    st.just({"type": "string", "not": {"const": "low"}}),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], share: float, closed: bool) -> dict[str, Any]:
        required = list(properties)[: round(len(properties) * share)]
        more = {"additionalProperties": False} if closed else {}
        return {"type": "object", "properties": properties, "required": required, **more}

    named = st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    return st.builds(build, named, st.sampled_from([0.0, 0.5, 1.0]), st.booleans())


def composite(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    two = st.tuples(objects(inner), objects(inner)).map(
        lambda pair: [{**s, "additionalProperties": True} for s in pair]
    )
    return st.one_of(
        objects(inner),
        of("array", inner.map(lambda s: {"items": s}), bounds("minItems", "maxItems", 0, 4)),
        st.lists(inner, min_size=1, max_size=3).map(
            lambda parts: {"type": "array", "prefixItems": parts, "items": False}
        ),
        st.just({"type": "array", "items": {"type": "integer", "minimum": 0}, "uniqueItems": True, "minItems": 4}),
        inner.map(lambda s: {"type": "object", "additionalProperties": s, "minProperties": 1, "maxProperties": 3}),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
        inner.map(lambda s: {"allOf": [s, {"description": "the same"}]}),
        st.tuples(strings, numbers).map(lambda parts: {"oneOf": list(parts)}),
        two.filter(lambda pair: not pair[0]["properties"].keys() & pair[1]["properties"].keys()).map(
            lambda pair: {"allOf": pair}
        ),
        inner.map(
            lambda s: {"type": "array", "contains": {"const": "needle"}, "items": {"anyOf": [{"type": "string"}]}}
        ),
    )


TREE = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "children": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
    "required": ["name", "children"],
    "additionalProperties": False,
}
schemas = st.recursive(plain, composite, max_leaves=12).map(
    lambda s: {"$defs": {"tree": TREE}, **s} if isinstance(s, dict) else {"$defs": {"tree": TREE}}
)


def made(schema: Any, seed: int = 0) -> Any:
    rng = random.Random(seed)
    return instance(schema, rng, Hints("planner", Topic("Import customer addresses from a CSV file"), rng))


@everyday
@given(schemas, st.integers(0, 1000))
def test_an_instance_fits_its_schema(schema: dict[str, Any], seed: int) -> None:
    Draft202012Validator(schema).validate(made(schema, seed))


@everyday
@given(schemas, st.integers(0, 1000))
def test_the_same_seed_gives_the_same_instance(schema: dict[str, Any], seed: int) -> None:
    assert made(schema, seed) == made(schema, seed)


@everyday
@given(
    schemas,
    st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(-60, 60), st.floats(-9, 9), st.text(max_size=6)),
        lambda inner: st.one_of(
            st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)
        ),
        max_leaves=6,
    ),
)
def test_the_own_check_agrees_with_jsonschema(schema: dict[str, Any], value: Any) -> None:
    assert fits(schema, value) == Draft202012Validator(schema).is_valid(value)


@everyday
@given(schemas)
def test_a_wrong_instance_misses_its_schema(schema: dict[str, Any]) -> None:
    validator = Draft202012Validator(schema)
    candidates: tuple[Any, ...] = ({"unexpected": True}, [], "unexpected", 17, None)
    if not all(validator.is_valid(value) for value in candidates):
        assert not validator.is_valid(wrong_instance(schema, random.Random(0)))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        {"anyOf": [{"type": "array", "items": {"$ref": "#"}}, {"type": "null"}]},
        {"type": "object", "properties": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#"}]}}, "required": ["a"]},
        {"type": "string", "pattern": "^[A-Z]{2}[0-9]{6}$", "minLength": 8},
        {"type": "string", "minLength": 500, "maxLength": 500},
        {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "minItems": 3},
        {
            "if": {"properties": {"kind": {"const": "a"}}, "required": ["kind"]},
            "then": {"required": ["b"]},
            "type": "object",
        },
        {"type": "object", "dependentRequired": {"a": ["b"]}, "properties": {"a": {"type": "string"}}},
        {
            "type": "object",
            "patternProperties": {"^x_": {"type": "integer"}},
            "minProperties": 2,
            "additionalProperties": False,
        },
        {"type": "object", "propertyNames": {"pattern": "^k[0-9]$"}, "minProperties": 2},
        {"allOf": [{"type": "integer"}, {"minimum": 7}, {"maximum": 9}, {"not": {"const": 8}}]},
        {"type": "array", "items": [{"type": "string"}, {"type": "integer"}], "minItems": 2},
        {"oneOf": [{"type": "integer"}, {"type": "number", "minimum": 3}]},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$anchor": "a", "type": "object", "properties": {"b": {"$ref": "#a"}}}}},
        {"type": "number", "multipleOf": 0.01, "minimum": 0.005},
        {"type": "string", "format": "email", "maxLength": 6},
    ],
)
def test_awkward_schemas(schema: dict[str, Any]) -> None:
    # The array form of `items` is draft 7; draft 2020-12 reads it as any array.
    checked = (
        {**schema, "prefixItems": schema["items"], "items": True} if isinstance(schema.get("items"), list) else schema
    )
    for seed in range(20):
        Draft202012Validator(checked).validate(made(schema, seed))


@pytest.mark.parametrize(
    "schema", [False, {"type": "integer", "minimum": 3, "maximum": 2}, {"enum": []}, {"$ref": "#"}]
)
def test_what_cannot_be_is_said(schema: Any) -> None:
    with pytest.raises(Impossible):
        made(schema)


@given(st.sampled_from(PATTERNS), st.integers(0, 10_000))
@settings(deadline=None, database=None)
def test_texts_match_their_pattern(pattern: str, seed: int) -> None:
    assert fits({"pattern": pattern}, matching_text(pattern, random.Random(seed)))


def test_a_plan_reads_like_one() -> None:
    task = {
        "id": {"type": "string"},
        "title": {"type": "string"},
        "depends_on": {"type": "array", "items": {"type": "string"}},
    }
    properties = {
        "tasks": {"type": "array", "items": {"type": "object", "properties": task, "required": list(task)}},
        "risks": {"type": "array", "items": {"type": "string"}},
        "approved": {"type": "boolean"},
    }
    plan = made({"type": "object", "properties": properties, "required": list(properties)})

    ids = [item["id"] for item in plan["tasks"]]
    assert ids == [f"t{number + 1}" for number in range(len(ids))]
    assert 4 <= len(ids) <= 5
    for number, item in enumerate(plan["tasks"]):
        assert set(item["depends_on"]) <= set(ids[:number])
    assert any(item["depends_on"] for item in plan["tasks"])
    assert plan["approved"] is True
    assert plan["risks"]
    assert "customer" in str(plan)
