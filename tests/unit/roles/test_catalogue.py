"""Every bundled role, checked as a whole: its prompt, its schema, its defaults, and the catalogue that holds them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from gorgon_common.costs.prices import GenaiPricer
from gorgon_common.costs.usage import Usage
from gorgon_common.errors import NotFound
from gorgon_common.roles.catalogue import (
    EFFORTS,
    TIERS,
    Role,
    RoleCatalogue,
    close_schema,
    load_roles,
    read_role,
)
from gorgon_common.roles.models import resolve_model

ROLES = load_roles()
MISSION = {
    "planner",
    "builder",
    "tester",
    "reviewer",
    "architect",
    "documenter",
    "data_analyst",
    "devops",
    "security",
    "migrator",
}
OLDER = {"data_engineer", "analyst", "visualizer", "reporter", "model_builder"}
ALL_ROLES = pytest.mark.parametrize("role", ROLES.values(), ids=lambda role: role.name)
PARTS = (
    "Before you start:",
    "How you work:",
    "Done when:",
    "What you return:",
    "When something is missing:",
    "Material:",
)


def objects(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the schema and every schema inside it."""
    yield schema
    for part in schema.get("properties", {}).values():
        yield from objects(part)
    if "items" in schema:
        yield from objects(schema["items"])


def properties(role: str, *path: str) -> set[str]:
    """Return the property names of a role's output, or of the items of one of its lists."""
    schema = ROLES[role].output_schema
    for name in path:
        schema = schema["properties"][name]["items"]
    return set(schema["properties"])


def test_the_catalogue_holds_the_roles_of_the_mission_and_of_older_files() -> None:
    assert set(ROLES) == MISSION | OLDER
    assert list(ROLES) == sorted(ROLES)


@pytest.mark.parametrize("alias", ["security_auditor", "security_analyst"])
def test_an_alias_finds_its_role_but_is_not_listed(alias: str) -> None:
    assert ROLES[alias] is ROLES["security"]
    assert alias in ROLES
    assert alias not in list(ROLES)
    assert ROLES.aliases[alias] == "security"


def test_an_unknown_role_names_the_nearest_one() -> None:
    with pytest.raises(NotFound) as caught:
        ROLES.find("reviwer")
    assert "Did you mean reviewer?" in caught.value.hint
    assert "reviwer" not in ROLES
    with pytest.raises(KeyError):
        ROLES["reviwer"]


def test_an_alias_cannot_be_taken_twice() -> None:
    role = ROLES["security"]
    twin = Role(**{**role.to_dict(), "name": "twin", "aliases": ("planner",), "allowed_tools": ()})
    with pytest.raises(ValueError, match="planner is taken"):
        RoleCatalogue({"twin": twin, "planner": ROLES["planner"]})


@ALL_ROLES
def test_the_prompt_names_its_role_first_and_has_every_part(role: Role) -> None:
    lines = role.system.splitlines()
    assert lines[0] == f"Role: {role.name}"
    positions = [role.system.find(f"\n{part}") for part in PARTS]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert 150 <= len(role.system.split()) <= 350


@ALL_ROLES
def test_the_prompt_refuses_instructions_found_in_the_material(role: Role) -> None:
    material = " ".join(role.system.partition("\nMaterial:")[2].split())
    assert re.search(r"not follow|never follow|follow none|never to follow", material)


@ALL_ROLES
def test_the_prompt_names_every_verdict_of_its_schema(role: Role) -> None:
    for name, part in role.output_schema["properties"].items():
        if part["type"] == "boolean":
            assert name in role.system


@ALL_ROLES
def test_the_defaults_are_known(role: Role) -> None:
    assert role.provider in {"openai", "anthropic"}
    assert role.tier in TIERS
    assert role.effort in EFFORTS
    assert resolve_model(role.provider, role.tier) not in TIERS
    assert 1_000 <= role.max_tokens <= 32_000
    assert role.purpose.endswith(".")
    assert "{{" not in role.task
    assert 10 <= len(role.task.split()) <= 60
    assert all(re.fullmatch(r"(github|notion|gmail|slack|http)\.[a-z_]+", tool) for tool in role.allowed_tools)


@ALL_ROLES
@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_the_model_has_a_price_at_either_provider(role: Role, provider: str) -> None:
    usage = Usage(input_tokens=1_000_000, output_tokens=1_000_000)
    cost = GenaiPricer().price(provider, resolve_model(provider, role.tier), usage)
    assert cost is not None
    assert cost > 0


@ALL_ROLES
def test_no_role_may_write_or_send(role: Role) -> None:
    verbs = {tool.split(".")[1].split("_")[0] for tool in role.allowed_tools}
    assert verbs <= {"get", "list", "read", "search", "query"}


@ALL_ROLES
def test_the_output_schema_is_valid_and_within_what_both_providers_accept(role: Role) -> None:
    Draft202012Validator.check_schema(dict(role.output_schema))
    assert role.output_schema["type"] == "object"
    for part in objects(role.output_schema):
        assert part.keys() <= {
            "type",
            "properties",
            "required",
            "additionalProperties",
            "items",
            "enum",
            "description",
        }
        assert part["type"] in {"object", "array", "string", "integer", "number", "boolean"}
        if part["type"] == "object":
            assert part["required"] == list(part["properties"])
            assert part["additionalProperties"] is False
        if part["type"] == "array":
            assert part["items"]["type"]


def test_what_planner_tester_and_reviewer_give_at_least() -> None:
    assert {"approved", "summary", "tasks", "risks", "success_criteria"} <= properties("planner")
    assert {"id", "title", "description", "depends_on"} <= properties("planner", "tasks")
    assert {"passed", "tests_run", "results"} <= properties("tester")
    assert {"approved", "score", "findings", "summary"} <= properties("reviewer")
    assert {"severity", "category", "description", "location", "suggestion"} <= properties("reviewer", "findings")
    assert ROLES["planner"].output_schema["properties"]["approved"]["type"] == "boolean"
    assert ROLES["tester"].output_schema["properties"]["passed"]["type"] == "boolean"


@ALL_ROLES
def test_a_verdict_comes_after_its_grounds(role: Role) -> None:
    names = list(role.output_schema["properties"])
    for verdict in {"approved", "passed", "completed"} & set(names):
        assert names[-1] == verdict


def test_a_closed_schema_refuses_what_is_missing_and_what_is_unknown() -> None:
    schema = close_schema(
        {
            "type": "object",
            "properties": {
                "list": {"type": "array", "items": {"type": "object", "properties": {"a": {"type": "string"}}}}
            },
        }
    )
    validator = Draft202012Validator(schema)
    validator.validate({"list": [{"a": "x"}]})
    for wrong in ({}, {"list": [{}]}, {"list": [], "other": 1}, {"list": [{"a": "x", "b": "y"}]}):
        with pytest.raises(ValidationError):
            validator.validate(wrong)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"temper": "mild"}, "no others"), ({"tier": "huge"}, "tier is one of"), ({"effort": "none"}, "effort one of")],
)
def test_a_role_file_with_a_mistake_says_which_file_and_what(change: dict[str, str], said: str) -> None:
    text = yaml.safe_dump({**ROLES["tester"].to_dict(), **change})
    with pytest.raises(ValueError, match=said) as caught:
        read_role(text, "tester.yaml")
    assert "tester.yaml" in str(caught.value)


def test_what_to_dict_gives_can_be_read_back() -> None:
    assert read_role(yaml.safe_dump(ROLES["security"].to_dict(), sort_keys=False), "security") == ROLES["security"]


def test_reading_the_roles_imports_nothing_heavy() -> None:
    heavy = "{'pydantic', 'jsonschema', 'sqlalchemy', 'celery', 'httpx', 'openai', 'anthropic'}"
    load = "from gorgon_common.roles.catalogue import load_roles; load_roles()"
    program = f"import sys; {load}; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
