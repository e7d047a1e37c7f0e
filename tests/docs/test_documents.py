"""What the documents say, held against the real thing: links, workflow examples, commands, settings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from gorgon_api.errors import KINDS
from gorgon_common import logs, metrics
from gorgon_common.cli import build
from gorgon_common.engine.states import RUN_TRANSITIONS, STEP_TRANSITIONS, RunStatus, StepStatus
from gorgon_common.roles.catalogue import load_roles
from gorgon_common.settings import describe, load
from gorgon_common.workflow import loader
from tests.support.services import Services
from tests.unit.test_telemetry import EVENTS

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EACH_PAGE
def test_its_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        if anchor:
            assert anchor in anchors(linked), target


@EACH_PAGE
def test_its_workflows_load(page: Path) -> None:
    for text in blocks(page, "yaml"):
        if re.match(r"\s*(#.*\n)*name:", text):
            assert loader.load(text, file=str(page), roles=load_roles()).spec.steps


@EACH_PAGE
def test_its_steps_load(page: Path) -> None:
    for text in blocks(page, "yaml"):
        steps = re.sub(r"\Asteps:\n", "", text)
        if steps.lstrip().startswith("- id:"):
            assert loader.load(f"name: example\nsteps:\n{steps}", file=str(page), roles=load_roles()).spec.steps


def mentioned(page: Path) -> Iterator[list[str]]:
    """Yield the words of each `gorgon …` in code, up to the first that is no name of a command."""
    text = page.read_text(encoding="utf-8")
    code = re.findall(r"`([^`\n]+)`", text) + re.findall(
        r"^(?:\$ )?(.+)$", "\n".join(blocks(page, "(?:console|sh)")), re.M
    )
    for line in code:
        for words in re.findall(r"(?<![\w./-])gorgon ((?:[a-z|]+(?: |$))+)", line):
            yield words.split()


def options(command: Any) -> dict[str, Any]:
    return dict(getattr(command, "commands", {}))


@EACH_PAGE
def test_the_commands_that_it_names_exist(page: Path) -> None:
    root = typer.main.get_command(build())
    for words in mentioned(page):
        known: Any = options(root)
        for word in words:
            names = word.split("|")
            if not known:
                break  # an argument
            assert set(names) <= known.keys(), " ".join(words)
            known = options(known[names[0]])


def test_the_options_of_the_table_exist() -> None:
    root = typer.main.get_command(build())
    run = options(root)["run"]
    known = {name for parameter in run.params for name in [*parameter.opts, *parameter.secondary_opts]}
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = text.partition("| `gorgon run FILE")[2].partition("| `gorgon runs")[0]
    named = set(re.findall(r"`(--?[a-z-]+)", rows))
    assert {"-i", "--live", "--server"} <= named <= known


def test_every_command_is_in_the_table() -> None:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    for name, command in options(typer.main.get_command(build())).items():
        assert command.hidden or f"`gorgon {name}" in text, name


def test_every_setting_is_in_the_table() -> None:
    rows = re.findall(r"^\| `([A-Z_]+)` \| (.*?) \| (.*) \|$", (ROOT / "docs/operations.md").read_text("utf-8"), re.M)
    settings = [(entry.variable, entry.description) for entry in describe(load()) if entry.variable != "GORGON_HOME"]
    told = [(variable, text) for variable, _, text in rows if variable != "GORGON_HOME"]
    assert told == settings


def test_every_key_of_a_step_and_of_the_limits_is_in_the_reference() -> None:
    text = (ROOT / "docs" / "workflow-language.md").read_text(encoding="utf-8")
    from_schema = loader.Workflow.model_json_schema()["$defs"]
    for name in [*from_schema["Step"]["properties"], *from_schema["Limits"]["properties"]]:
        assert name.startswith("$") or name == "id" or re.search(rf"`[^`\n]*\b{name}\b|^{name}:", text), name


def test_the_routes_of_the_table_are_those_of_the_api() -> None:
    app = create_app(cast(Services, None), SingleKey("key"))  # nothing is asked of it
    routes = {(verb.upper(), path) for path, verbs in app.openapi()["paths"].items() for verb in verbs}
    text = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(GET|POST|PUT) (/\S+)` \|", text, re.MULTILINE)) == routes


def test_the_modules_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:engine|workflow)/\w+)(?:\.py)?`", text))
    assert len(named) >= 6
    for name in named:
        path = ROOT / "gorgon_common" / name
        assert path.is_dir() or path.with_suffix(".py").exists(), name


def drawn(first: str) -> set[tuple[str, str]]:
    """The arrows of the state diagram that begins at this state, those from and to the dot left out."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    diagram = text.partition(f"stateDiagram-v2\n    [*] --> {first}\n")[2].partition("```")[0]
    return set(re.findall(r"^    (\w+) --> (\w+)", diagram, re.MULTILINE))


def test_the_diagrams_draw_every_transition() -> None:
    cancelled = StepStatus.CANCELLED  # told in a sentence: any that is not finished
    steps = {(a, b) for a, after in STEP_TRANSITIONS.items() for b in after if b is not cancelled}
    assert drawn("pending") == {(a.name.lower(), b.name.lower()) for a, b in steps}
    assert all(cancelled in after for after in STEP_TRANSITIONS.values() if after)
    runs: set[tuple[RunStatus, RunStatus]] = {(a, b) for a, after in RUN_TRANSITIONS.items() for b in after}
    assert drawn("queued") == {(a.name.lower(), b.name.lower()) for a, b in runs}


def test_every_kind_of_problem_is_in_the_table() -> None:
    text = (ROOT / "docs" / "http-api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([a-z-]+)` \| [\d, ]+ \| (.+) \|$", text, re.MULTILINE)
    assert dict(rows) == KINDS


def test_every_metric_is_in_the_table() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(gorgon_[a-z_]+)`", text))
    assert named == {f"{metric.name}_total" if metric.kind == "Counter" else metric.name for metric in metrics.ALL}


def test_every_line_about_runs_steps_and_calls_is_in_the_table() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for event in EVENTS:
        _, name, _ = logs._LINES[type(event)](event)
        assert f"`{name}`" in text, name
