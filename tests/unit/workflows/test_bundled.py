"""The bundled workflows, their index and the templates: what can be told without running them."""

from __future__ import annotations

from importlib import resources
from typing import Any

import pytest
import yaml

from gorgon_common.roles.catalogue import load_roles
from gorgon_common.workflow.loader import load

FOLDER = resources.files("workflows")
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


@BUNDLED
def test_it_loads_without_a_warning(name: str) -> None:
    assert load(bundled(name), file=name, roles=load_roles()).problems == []


@BUNDLED
def test_it_runs_without_arguments(name: str) -> None:
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
    assert load(text, file=template, roles=load_roles()).problems == []
    assert text.startswith("# ")
    assert len(text.splitlines()) <= 40


def test_there_are_the_templates_that_people_ask_for() -> None:
    assert {"minimal.yaml", "map.yaml", "review.yaml"} <= set(TEMPLATES)
