from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from gorgon_common import durations
from gorgon_common.documents import read_document
from gorgon_common.workflow import catalogue
from gorgon_common.workflow.schema import (
    Step,
    Workflow,
    duration,
    input_schemas,
    json_schema,
    output_schema,
    refused_env,
)

FILES = Path(__file__).parent / "files"
SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def step(**keys: Any) -> Step:
    return Step.model_validate({"id": "a", **keys})


# Durations


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *[("5m", 300), ("24h", 86400), ("1h30m", 5400), ("90s", 90), ("2d", 172800), ("500ms", 0.5), ("1.5h", 5400)],
        *[("5", 5), ("1h 30m", 5400), (" 5m ", 300), (90, 90), (0.25, 0.25), (0, 0)],
    ],
)
def test_durations_are_seconds(text: Any, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "m", "5 minutes", "30m1h", "-5m", True, None, [], "9999999d", -1])
def test_what_is_no_duration_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=r"duration|out of range"):
        duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(300, "5m"), (90, "1m30s"), (5400, "1h30m"), (86400, "24h"), (0.5, "500ms"), (0, "0s")]
)
def test_durations_have_one_text(seconds: float, text: str) -> None:
    assert durations.text(seconds) == text
    assert duration(text) == seconds


# Sugar


def test_sugar_folds_into_one_form() -> None:
    made = step(
        prompt="hi",
        depends_on="b",
        model="m",
        max_retries=4,
        cache="24h",
        timeout=90,
        on_failure="continue_with_default",
        default_output={"x": 1},
        trust=True,
    )
    assert made.depends_on == ["b"]
    assert (made.models, made.model) == (["m"], None)
    assert made.retry is not None
    assert (made.retry.max, made.max_retries) == (4, None)
    assert made.cache is not None
    assert made.cache.ttl == 86400
    assert made.on_failure == "fallback"
    assert made.fallback is not None
    assert (made.fallback.type, made.fallback.value) == ("default_value", {"x": 1})
    assert (made.timeout, made.trust) == (90.0, "true")


@pytest.mark.parametrize(
    ("keys", "most", "then"),
    [
        ({"on_failure": "retry"}, 3, "abort"),
        ({"on_failure": "retry", "max_retries": 5}, 5, "abort"),
        ({"on_failure": "retry", "retry": {"backoff": "fixed"}}, 3, "abort"),
        ({"on_failure": "retry", "retry": 1, "then": "skip"}, 1, "skip"),
        ({"on_failure": "skip", "max_retries": 0}, 0, "skip"),
    ],
)
def test_retry_is_retries_and_then_what(keys: dict[str, Any], most: int, then: str) -> None:
    made = step(prompt="hi", **keys)
    assert made.retry is not None
    assert (made.retry.max, made.on_failure) == (most, then)


def test_a_retried_step_may_fall_back() -> None:
    made = step(prompt="hi", on_failure="retry", then="fallback", fallback={"type": "model", "model": "openai:gpt-6"})
    assert made.on_failure == "fallback"
    assert made.fallback is not None
    assert made.fallback.model == "openai:gpt-6"


def test_a_default_of_nothing_is_a_default() -> None:
    made = step(prompt="hi", on_failure="continue_with_default", default_output=None)
    assert made.fallback is not None
    assert made.fallback.value is None


@pytest.mark.parametrize(
    ("keys", "action"),
    [
        ({"prompt": "hi"}, "prompt"),
        ({"role": "planner"}, "prompt"),
        ({"uses": "a.b"}, "uses"),
        ({"run": ["a", 1]}, "run"),
        ({"run": "a | b"}, "run"),
        ({"workflow": "x@3"}, "workflow"),
        ({"approval": "go?"}, "approval"),
        ({"wait": "5m"}, "wait"),
        ({"wait": {"event": "e", "timeout": "24h"}}, "wait"),
        ({"aggregate": {"from": "{{x}}"}}, "aggregate"),
        ({"checkpoint": "here"}, "checkpoint"),
        ({"steps": [{"id": "b", "prompt": "hi"}]}, "steps"),
    ],
)
def test_every_action_is_known(keys: dict[str, Any], action: str) -> None:
    assert step(**keys).action == action


def test_commands_are_lists_or_a_text_for_the_shell() -> None:
    argv, text = step(run=["sleep", 1]), step(run="a | b")
    assert (argv.run, argv.shell) == (["sleep", "1"], None)
    assert (text.run, text.shell) == (None, "a | b")


@pytest.mark.parametrize("share", ["90%", 0.9])
def test_shares(share: Any) -> None:
    made = step(prompt="hi", map={"over": [1], "on_item_failure": "continue", "min_success": share})
    assert made.map is not None
    assert made.map.min_success == pytest.approx(0.9)


def test_conditions_are_plain_data_again() -> None:
    condition = {"any": [{"field": "a", "operator": "exists"}, {"not": {"field": "b", "operator": "in", "value": [1]}}]}
    made = step(prompt="hi", condition=condition).condition
    assert made is not None
    assert made.plain() == {
        "any": [
            {"field": "a", "operator": "exists", "on_missing": "error"},
            {"not": {"field": "b", "operator": "in", "value": [1], "on_missing": "error"}},
        ]
    }


def test_on_missing_false_may_be_written_as_a_boolean() -> None:
    made = step(prompt="hi", condition={"field": "a", "operator": "exists", "on_missing": False}).condition
    assert made is not None
    assert made.on_missing == "false"


def test_until_is_an_expression_or_a_condition() -> None:
    text = step(prompt="hi", loop={"until": "a.ok"}).loop
    mapping = step(prompt="hi", loop={"until": {"field": "a.ok", "operator": "exists"}}).loop
    assert text is not None
    assert mapping is not None
    assert (text.until, text.max) == ("a.ok", 5)
    assert not isinstance(mapping.until, str)
    assert mapping.until.field == "a.ok"


# Inputs and outputs


def test_inputs_become_json_schema() -> None:
    made = input_schemas(
        {
            "a": "string",
            "b": {"type": "array", "items": "integer", "default": [], "max_items": 50},
            "c": {"type": "string", "required": True, "description": "What"},
            "d": {"type": "object", "properties": {"x": {"type": "string", "required": True}, "y": "integer"}},
        }
    )
    assert made == {
        "a": {"type": "string", "required": False},
        "b": {"type": "array", "items": {"type": "integer"}, "default": [], "maxItems": 50, "required": False},
        "c": {"type": "string", "required": True, "description": "What"},
        "d": {
            "type": "object",
            "properties": {"x": {"type": "string"}, "y": {"type": "integer"}},
            "x-required": ["x"],
            "required": False,
        },
    }


def test_outputs_become_json_schema_with_every_field_required() -> None:
    made = output_schema(
        {
            "approved": "boolean",
            "notes": {"type": "string", "required": False},
            "tasks": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "string"}}}},
        }
    )
    assert made == {
        "type": "object",
        "properties": {
            "approved": {"type": "boolean"},
            "notes": {"type": "string"},
            "tasks": {
                "type": "array",
                "items": {"type": "object", "properties": {"id": {"type": "string"}}, "required": ["id"]},
            },
        },
        "required": ["approved", "tasks"],
    }
    jsonschema.Draft202012Validator.check_schema(made)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "string"}}, "additionalProperties": False},
        {"type": "string", "description": "A title"},
        {"anyOf": [{"type": "string"}, {"type": "null"}]},
        {"type": "array", "items": {"type": "integer"}},
    ],
)
def test_a_json_schema_is_left_as_it_is(schema: dict[str, Any]) -> None:
    assert output_schema(schema) == schema


def test_fields_may_be_called_type_and_title() -> None:
    made = output_schema({"type": "string", "title": "string"})
    assert made["properties"] == {"type": {"type": "string"}, "title": {"type": "string"}}


@pytest.mark.parametrize("name", ["PATH", "IFS", "LD_PRELOAD", "BASH_ENV", "BASH_FUNC_x%%", "a b", "1x", ""])
def test_environment_names_that_change_the_command_are_refused(name: str) -> None:
    assert refused_env(name)


@pytest.mark.parametrize("name", ["HOME_DIR", "x", "_a1", "PATHS"])
def test_other_environment_names_are_free(name: str) -> None:
    assert not refused_env(name)


# The closed schema


def test_keys_of_older_files_cannot_be_written() -> None:
    for keys in ({"$shell": "rm"}, {"$legacy": {}}, {"approval": {"message": "x", "$preview": []}}):
        with pytest.raises(ValidationError, match="unknown key"):
            step(**{"prompt": "x", **keys} if "approval" not in keys else keys)
    with pytest.raises(ValidationError, match="unknown key `\\$lenient`"):
        Workflow.model_validate({"name": "a", "steps": [{"id": "a", "prompt": "b"}], "$lenient": True})


def test_walk_yields_every_step_in_the_order_of_the_file() -> None:
    spec = Workflow.model_validate(
        {
            "name": "a",
            "steps": [
                {"id": "g", "steps": [{"id": "i", "prompt": "x"}, {"id": "j", "prompt": "x"}]},
                {"id": "m", "prompt": "x", "map": {"over": [1], "reduce": {"prompt": "y"}}},
                {"id": "f", "prompt": "x", "on_failure": "fallback"}
                | {"fallback": {"type": "alternate_step", "step": {"prompt": "z"}}},
            ],
            "on_error": [{"id": "e", "run": ["x"]}],
            "finally": [{"id": "t", "run": ["x"]}],
        }
    )
    assert [(path, entry.id) for path, entry in spec.walk()] == [
        (("steps", 0), "g"),
        (("steps", 0, "steps", 0), "i"),
        (("steps", 0, "steps", 1), "j"),
        (("steps", 1), "m"),
        (("steps", 1, "map", "reduce"), None),
        (("steps", 2), "f"),
        (("steps", 2, "fallback", "step"), None),
        (("on_error", 0), "e"),
        (("finally", 0), "t"),
    ]


# JSON Schema


def test_the_json_schema_is_valid_and_names_its_draft() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def nodes(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for entry in value.values():
            yield from nodes(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from nodes(entry)


def test_every_key_has_a_description_and_no_key_is_internal() -> None:
    shown = 0
    for node in nodes(SCHEMA):
        if node.get("additionalProperties") is False:
            for name, entry in node["properties"].items():
                assert entry.get("description"), name
                assert not name.startswith("$")
                shown += 1
    assert shown > 80
    assert "null" not in [node.get("type") for node in nodes(SCHEMA)]


BUNDLED = {entry.name: catalogue.source(entry.name) for entry in catalogue.entries()}
BUNDLED |= {f"template {name}": catalogue.template(name) for name in catalogue.templates()}
BUNDLED |= {f"snippet {path.stem}": path.read_text() for path in (FILES / "snippets").glob("*.yaml")}


@pytest.mark.parametrize("text", BUNDLED.values(), ids=BUNDLED)
def test_the_json_schema_accepts_what_loads(text: str) -> None:
    data = read_document(text).data
    Workflow.model_validate(data)
    VALIDATOR.validate(data)


SUGAR: list[dict[str, Any]] = [
    {"prompt": "x", "depends_on": "b", "timeout": "1h 30m", "retry": 3, "cache": "24h", "trust": True},
    {"prompt": "x", "retry": {"max": 2, "initial": "500ms", "on": ["timeout"]}, "models": ["a", "openai:b"]},
    {"run": "a | b"},
    {"run": ["sleep", 1], "env": {"A": "1"}, "stdin": "x", "allow_failure": True},
    {"approval": "go?"},
    {"approval": {"message": "go?", "approvers": "role:x", "timeout": 60}},
    {"wait": 5},
    {"wait": "10m"},
    {"wait": {"until": "{{inputs.t}}"}},
    {"aggregate": {"from": "{{x}}", "how": "vote"}},
    {"prompt": "x", "condition": {"not": {"field": "a", "operator": "exists", "on_missing": False}}},
    {"prompt": "x", "loop": {"until": {"field": "a", "operator": "equals", "value": 1}, "max": 3}},
    {"prompt": "x", "map": {"over": "{{x}}", "min_success": "90%", "on_item_failure": "continue"}},
    {"role": "planner", "output": {"a": "boolean", "b": {"type": "array", "items": {"type": "string"}}}},
    {"checkpoint": "x"},
    {"workflow": "x@latest", "with": {"a": 1}},
]


@pytest.mark.parametrize("keys", SUGAR, ids=str)
def test_models_and_json_schema_agree_on_what_is_right(keys: dict[str, Any]) -> None:
    data = {"name": "a", "steps": [{"id": "s", **keys}]}
    Workflow.model_validate(data)
    VALIDATOR.validate(data)


WRONG: list[dict[str, Any]] = [
    {},
    {"promt": "x"},
    {"prompt": 5},
    {"prompt": None},
    {"prompt": "x", "timeout": "soon"},
    {"prompt": "x", "max_retries": "3"},
    {"prompt": "x", "on_failure": "ignore"},
    {"prompt": "x", "provider": "azure"},
    {"prompt": "x", "depends_on": 5},
    {"prompt": "x", "condition": {"field": "a", "operator": "like", "value": 1}},
    {"prompt": "x", "map": {"as": "x"}},
    {"prompt": "x", "loop": {"max": 3}},
    {"prompt": "x", "map": {"over": [1], "min_success": "most"}},
    {"run": []},
    {"run": [1.5]},
    {"approval": {"approvers": []}},
    {"approval": ""},
    {"steps": []},
    {"aggregate": {"from": "x", "how": "sum"}},
    {"prompt": "x", "budget_usd": -1},
]


@pytest.mark.parametrize("keys", WRONG, ids=str)
def test_models_and_json_schema_agree_on_what_is_wrong(keys: dict[str, Any]) -> None:
    data = {"name": "a", "steps": [{"id": "s", **keys}]}
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(ValidationError):
        Workflow.model_validate(data)


@pytest.mark.parametrize(
    "keys",
    [
        *[{"nam": "b"}, {"limits": {"budget": 5}}, {"inputs": {"a": {"type": "strng"}}}, {"inputs": ["a"]}],
        *[{"triggers": [{"shedule": "x"}]}, {"concurrency": {"max": 1}}, {"finally": {}}, {"secrets": "a"}],
    ],
    ids=str,
)
def test_models_and_json_schema_agree_on_the_file(keys: dict[str, Any]) -> None:
    data = {"name": "a", "steps": [{"id": "s", "prompt": "x"}], **keys}
    assert not VALIDATOR.is_valid(data)
    with pytest.raises(ValidationError):
        Workflow.model_validate(data)
