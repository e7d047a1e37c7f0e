"""The bundled workflows, their index and the templates: what can be told without running them."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from gorgon_common.bundled import folder
from gorgon_common.errors import InputInvalid
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow.compiler import check_inputs, try_compile
from gorgon_common.workflow.formatter import format_text
from gorgon_common.workflow.loader import load
from gorgon_common.workflow.plan import Kind, Plan

FOLDER = folder("workflows")
INDEX: dict[str, dict[str, Any]] = yaml.safe_load((FOLDER / "index.yaml").read_text(encoding="utf-8"))["workflows"]
TEMPLATES = sorted(entry.name for entry in (FOLDER / "templates").iterdir() if entry.name.endswith(".yaml"))
BUNDLED = pytest.mark.parametrize("name", INDEX)


def bundled(name: str) -> str:
    return (FOLDER / INDEX[name]["file"]).read_text(encoding="utf-8")


def test_the_index_lists_every_file_and_nothing_else() -> None:
    files = {entry.name for entry in FOLDER.iterdir() if entry.name.endswith(".yaml")} - {"index.yaml"}
    assert {entry["file"] for entry in INDEX.values()} == files


@BUNDLED
def test_an_entry_says_what_the_file_says(name: str) -> None:
    entry = INDEX[name]
    assert entry.keys() == {"file", "title", "description", "shows"}
    assert entry["file"] == f"{name}.yaml"
    spec = load(bundled(name)).spec
    assert spec.name == name
    assert spec.description == entry["description"]


def compiled(text: str) -> Plan:
    """The plan of a text about which nothing is to say, not even a warning."""
    loaded = load(text, roles=load_roles())
    made = try_compile(loaded, roles=load_roles())
    assert [*loaded.problems, *made.problems] == []
    assert made.plan is not None
    assert made.plan.unavailable == ()
    return made.plan


@BUNDLED
def test_it_compiles_without_a_warning(name: str) -> None:
    assert compiled(bundled(name)).name == name


@BUNDLED
def test_it_takes_its_defaults_and_no_unknown_input(name: str) -> None:
    plan = compiled(bundled(name))
    assert check_inputs(plan, {}).keys() == plan.inputs.keys()
    with pytest.raises(InputInvalid):
        check_inputs(plan, {"no_such_input": 1})


def test_together_they_use_every_kind_that_can_run() -> None:
    kinds = {node.kind for name in INDEX for node in compiled(bundled(name)).nodes}
    assert kinds >= {Kind.AGENT, Kind.COMMAND, Kind.MAP, Kind.LOOP, Kind.GROUP, Kind.AGGREGATE, Kind.CHECKPOINT}


def test_feature_build_tests_and_audits_side_by_side() -> None:
    plan = compiled(bundled("feature-build"))
    needs = {node.id: {plan.nodes[dep.node].id for dep in node.deps} for node in plan.nodes}
    assert needs["tests"] == {"build", "plan"}
    assert needs["audit"] == {"build"}
    assert {"build", "tests", "audit"} <= needs["review"]


@BUNDLED
def test_every_input_has_a_default_and_says_what_it_is(name: str) -> None:
    for field, schema in load(bundled(name)).spec.inputs.items():
        assert "default" in schema, field
        assert not schema["required"]
        assert schema["description"]


@BUNDLED
def test_it_has_limits_outputs_and_metadata(name: str) -> None:
    spec = load(bundled(name)).spec
    assert spec.limits.timeout
    assert spec.outputs
    assert {"author", "category", "tags"} <= spec.metadata.keys()


@BUNDLED
def test_it_is_formatted(name: str) -> None:
    assert format_text(bundled(name)) == bundled(name)


@BUNDLED
def test_its_first_comment_says_how_to_run_it(name: str) -> None:
    head = bundled(name).partition("\nname:")[0]
    assert head.startswith("# ")
    assert f"gorgon run {name}" in head


@BUNDLED
def test_every_step_is_used_or_checked(name: str) -> None:
    """No step works for nothing: what it gives is read by another one, or by an output; a checkpoint writes a line."""
    text = bundled(name)
    for _, step in load(text).spec.walk():
        if step.id and step.checkpoint is None:
            assert text.count(f"{step.id}.") > 0, step.id


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_loads_and_is_commented(template: str) -> None:
    text = (FOLDER / "templates" / template).read_text(encoding="utf-8")
    assert compiled(text).name.startswith("my-")
    assert format_text(text) == text
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 40


def test_there_are_the_templates_that_people_ask_for() -> None:
    assert {"minimal.yaml", "map.yaml", "review.yaml"} <= set(TEMPLATES)
