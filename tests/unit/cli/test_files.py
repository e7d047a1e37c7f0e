"""init, validate, fmt, schema, graph, workflows, roles: without a database."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gorgon_common.client import schemas
from tests.unit.cli.conftest import Gorgon

GOOD = "name: w\nsteps:\n  - {id: a, role: planner, prompt: hi}\n"
BAD = "name: w\nsteps:\n  - {id: a, role: planner, promt: hi}\n  - {id: a, role: plannr, prompt: hi}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(BAD)
    return tmp_path


class TestInit:
    @pytest.mark.parametrize("template", ["minimal", "map", "review"])
    def test_writes_a_file_that_is_valid(self, gorgon: Gorgon, folder: Path, template: str) -> None:
        result = gorgon("init", "new/flow.yaml", "--template", template)
        assert result.exit_code == 0, result.output
        assert "gorgon run new/flow.yaml" in result.stdout
        assert gorgon("validate", "new/flow.yaml").exit_code == 0

    def test_overwrites_only_when_told(self, gorgon: Gorgon, folder: Path) -> None:
        assert gorgon("init", "good.yaml").exit_code == 2
        assert (folder / "good.yaml").read_text() == GOOD
        assert gorgon("init", "good.yaml", "--force").exit_code == 0
        assert (folder / "good.yaml").read_text() != GOOD

    def test_an_unknown_template_lists_them(self, gorgon: Gorgon, folder: Path) -> None:
        result = gorgon("init", "x.yaml", "-t", "none")
        assert result.exit_code == 2
        assert "minimal" in result.stderr


class TestValidate:
    def test_a_good_file(self, gorgon: Gorgon, folder: Path) -> None:
        result = gorgon("validate", "good.yaml", "feature-build")
        assert result.exit_code == 0, result.output
        assert "good.yaml is valid: 1 step" in result.stdout

    def test_a_bad_file_tells_everything_with_the_line(self, gorgon: Gorgon, folder: Path) -> None:
        result = gorgon("validate", "bad.yaml", "good.yaml")
        assert result.exit_code == 2
        assert "bad.yaml:3:" in result.stdout
        assert "bad.yaml:4:" in result.stdout
        assert "promt: hi" in result.stdout
        assert "^" in result.stdout
        assert "good.yaml is valid" in result.stdout

    def test_json_is_one_document_of_the_published_shape(self, gorgon: Gorgon, folder: Path) -> None:
        result = gorgon("validate", "bad.yaml", "--json")
        assert result.exit_code == 2
        answer = schemas.Validation.model_validate_json(result.stdout)
        assert not answer.valid
        assert {problem.file for problem in answer.problems} == {"bad.yaml"}

    def test_stdin(self, gorgon: Gorgon) -> None:
        assert gorgon("validate", "-", stdin=GOOD).exit_code == 0

    @pytest.mark.parametrize(("name", "told"), [("gone.yaml", "no file"), ("goood", "no bundled"), (".", "directory")])
    def test_what_is_not_there(self, gorgon: Gorgon, folder: Path, name: str, told: str) -> None:
        result = gorgon("validate", name)
        assert result.exit_code == 2
        assert told in result.stderr

    def test_bytes_that_are_no_text(self, gorgon: Gorgon, folder: Path) -> None:
        (folder / "x.yaml").write_bytes(b"\xff\xfe\x00")
        result = gorgon("validate", "x.yaml")
        assert result.exit_code == 2
        assert "not UTF-8" in result.stderr


class TestFmt:
    def test_rewrites_once(self, gorgon: Gorgon, folder: Path) -> None:
        (folder / "x.yaml").write_text("steps:\n- prompt:   hi\n  id: a\n  role: planner\nname: w\n")
        assert gorgon("fmt", "--check", "x.yaml").exit_code == 1
        assert gorgon("fmt", "x.yaml").exit_code == 0
        assert gorgon("fmt", "--check", "x.yaml").exit_code == 0
        assert (folder / "x.yaml").read_text().startswith("name: w\n")

    def test_stdin_to_stdout(self, gorgon: Gorgon) -> None:
        result = gorgon("fmt", "-", stdin=GOOD)
        assert result.exit_code == 0
        assert result.stdout.startswith("name: w\n")

    def test_broken_yaml_is_left_alone(self, gorgon: Gorgon, folder: Path) -> None:
        (folder / "x.yaml").write_text("name: [\n")
        assert gorgon("fmt", "x.yaml").exit_code == 2
        assert (folder / "x.yaml").read_text() == "name: [\n"


def test_schema_to_stdout_and_to_a_file(gorgon: Gorgon, folder: Path) -> None:
    printed = json.loads(gorgon("schema").stdout)
    assert printed["$schema"].endswith("2020-12/schema")
    result = gorgon("schema", "-o", "s.json")
    assert json.loads((folder / "s.json").read_text()) == printed
    assert "yaml-language-server: $schema=s.json" in result.stderr


def test_workflows(gorgon: Gorgon) -> None:
    listed = json.loads(gorgon("workflows", "ls", "--json").stdout)
    assert "feature-build" in {entry["name"] for entry in listed}
    assert "feature-build" in gorgon("workflows", "ls").stdout
    assert gorgon("workflows", "show", "feature-build").stdout.rstrip().endswith("}")
    assert gorgon("workflows", "show", "feature-bild").exit_code == 2


def test_roles(gorgon: Gorgon) -> None:
    listed = json.loads(gorgon("roles", "ls", "--json").stdout)
    assert {"planner", "builder", "tester", "reviewer"} <= {entry["name"] for entry in listed}
    assert "planner" in gorgon("roles", "ls").stdout
    shown = gorgon("roles", "show", "security_auditor").stdout
    assert shown.startswith("security\n")
    assert "approved" in gorgon("roles", "show", "planner").stdout
    assert "planner" in gorgon("roles", "show", "planer").stderr


class TestGraph:
    def test_steps_then_the_canvas(self, gorgon: Gorgon) -> None:
        text = gorgon("graph", "feature-build").stdout
        steps, _, canvas = text.partition("Celery canvas")
        assert "1. plan" in steps
        assert "for each item: builder" in steps
        assert "gorgon.agent plan" in canvas
        assert gorgon("graph", "feature-build", "--canvas").stdout.strip() == canvas.strip()

    def test_mermaid(self, gorgon: Gorgon, folder: Path) -> None:
        assert gorgon("graph", "good.yaml", "--mermaid").stdout.startswith("flowchart TD\n")

    def test_json_has_nodes_edges_and_the_canvas(self, gorgon: Gorgon) -> None:
        drawn = json.loads(gorgon("graph", "feature-build", "--json").stdout)
        ids = {node["index"]: node["id"] for node in drawn["nodes"]}
        edges = {(ids[edge["from"]], ids[edge["to"]]) for edge in drawn["edges"]}
        assert ("plan", "build") in edges
        assert drawn["canvas"]

    def test_a_file_that_does_not_load(self, gorgon: Gorgon, folder: Path) -> None:
        result = gorgon("graph", "bad.yaml", "--json")
        assert result.exit_code == 2
        assert json.loads(result.stdout)["error"]["problems"]
