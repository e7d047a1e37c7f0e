"""Every view of a terminal at 60, 80 and 120 columns, and in a pipe, compared with the text that is kept in `golden/`.

After a change that is meant, renew the texts and look at the difference before it is committed:

    GORGON_RENEW_GOLDEN=1 .venv/bin/python -m pytest -q tests/unit/cli/test_views.py && git diff tests/unit/cli/golden
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from rich.cells import cell_len

from gorgon_common.cli import budgets, build, costs, doctor, explain, limits, plans, runs, screen, terminal
from gorgon_common.client import schemas
from gorgon_common.settings import Setting
from tests.unit.cli import documents
from tests.unit.cli.documents import NOW

GOLDEN = Path(__file__).with_name("golden")
RENEW = os.environ.get("GORGON_RENEW_GOLDEN") == "1"
WIDTHS = (60, 80, 120)
PIPE = 0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
SPINNER = re.compile(r"[⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏]")
BROKEN = """\
name: Broken
inputs: {topic: {type: strin}}
steps:
  - {id: plan, role: plannr, prompt: "Plan {{inputs.topik}}"}
  - {id: build, role: builder, depends_on: [plann], prompt: "Build a long sentence that goes on {{plan.output}} and on"}
"""


class Screen(io.StringIO):
    """A terminal, or a pipe."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def isatty(self) -> bool:
        return self.width != PIPE


@contextlib.contextmanager
def a_screen(width: int) -> Iterator[Screen]:
    """Let everything be printed on a terminal of a width, without colours."""
    screen = Screen(width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", str(width or 80))
        patch.setenv("LINES", "40")
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("NO_COLOR", "1")
        with contextlib.redirect_stdout(screen), contextlib.redirect_stderr(screen):
            yield screen


def show(width: int, view: Callable[[], None]) -> str:
    with a_screen(width) as screen:
        view()
    text = SPINNER.sub("⠋", ESCAPES.sub("", screen.getvalue()))
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def command(*arguments: str, code: int = 0) -> Callable[[], None]:
    """Return a view: what a command prints."""

    def call() -> None:
        # The runner would put a pipe in the place of the terminal, so the command is called without it.
        with pytest.raises(SystemExit) as ended:
            build()(list(arguments), prog_name="gorgon")
        assert ended.value.code == code

    return call


def tree(document: dict[str, Any], *, whole: bool, note: str = "") -> Callable[[], None]:
    return lambda: terminal.draw(screen.RunDrawing(document, NOW, whole=whole, note=note))


def ending(document: dict[str, Any], **more: Any) -> Callable[[], None]:
    return lambda: terminal.draw(screen.ending(document, full=False, now=NOW, **more))


def journal() -> None:
    for event in documents.journal():
        runs.tell_event(event)


def health() -> None:
    findings = [
        doctor.Finding("Python", "ok", "3.12.4 on Linux x86_64"),
        doctor.Finding("Packages", "ok", "gorgon 0.1.0, celery 5.7.0, kombu 5.7.1, sqlalchemy 2.1.9, pydantic 2.14.2"),
        doctor.Finding("Home", "warning", "/home/ada/.gorgon, 0.1 GB free", "Make room: the database grows."),
        doctor.Finding("Database", "problem", "connection refused: postgresql://gorgon:********@db.internal:5432/gorgon",
                       "Start PostgreSQL, or check GORGON_DATABASE_URL."),
        doctor.Finding("OpenAI", "info", "no key: only the sandbox", "OPENAI_API_KEY is needed for --live."),
    ]  # fmt: skip
    settings = [
        Setting("GORGON_HOME", "/home/ada/.gorgon", "~/.gorgon", "Where the database and other files are kept."),
        Setting("GORGON_REDIS_URL", "", "", "Redis, for rate limits that workers share, and as the broker of Celery."),
        Setting("GORGON_SLOTS", "12", "50", "How many steps a worker runs at the same time."),
    ]
    doctor.tell(findings, settings)


VIEWS: dict[str, Callable[[], None]] = {
    "runs-ls": lambda: runs.tell_page(documents.page(), NOW),
    "runs-show": tree(documents.busy(), whole=True),
    "runs-show-waits-for-key": tree(documents.key_wait(), whole=True, note=runs.standing(documents.key_wait(), NOW)),
    "runs-logs": journal,
    "runs-explain": lambda: explain.tell(documents.explanation()),
    "runs-explain-key": lambda: explain.tell(documents.explanation(waits_for=documents.key_wait()["waits_for"])),
    "live-tree": tree(documents.busy(), whole=False, note="Cancelling: waiting for calls in flight."),
    "ending-succeeded": ending(documents.ended("succeeded")),
    "ending-failed": ending(documents.ended("failed"), file="workflows/report.yaml"),
    "ending-failed-on-server": ending(documents.ended("failed"), server="http://127.0.0.1:8000"),
    "lines-of-a-pipe": lambda: screen.Plain().update(documents.busy()),
    "plan": lambda: plans.tell(documents.estimate()),
    "plan-unpriced": lambda: plans.tell(documents.estimate(unknown=True)),
    "costs-report": lambda: costs.tell(documents.costs("provider", "model")),
    "costs-top": lambda: costs.tell(documents.costs("workflow", "step", "model", groups=7)),
    "costs-calls": lambda: costs.tell_calls(documents.calls()),
    "budgets-ls": lambda: budgets.tell(documents.budgets()),
    "limits-ls": lambda: limits.tell(*documents.limits()),
    "doctor": health,
    "workflows-ls": command("workflows", "ls"),
    "roles-ls": command("roles", "ls"),
    "roles-show": command("roles", "show", "planner"),
    "graph": command("graph", "feature-build"),
    "validate-problems": command("validate", "broken.yaml", code=2),
}  # fmt: skip


def commands() -> Iterator[tuple[str, ...]]:
    """Yield every command with its groups, and the program itself."""

    def below(group: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, found in getattr(group, "commands", {}).items():
            yield from below(found, (*path, name))

    return below(typer.main.get_command(build()), ())


COMMANDS = list(commands())
for path in COMMANDS:
    VIEWS["-".join(("help", *path))] = command(*path, "--help")


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder with the file that has problems."""
    path = tmp_path_factory.mktemp("views")
    (path / "broken.yaml").write_text(BROKEN)
    with contextlib.chdir(path):
        yield


@functools.cache
def shown(name: str, width: int) -> str:
    """Return a view as text: each is drawn once for all tests."""
    return show(width, VIEWS[name])


def heading(width: int) -> str:
    return "-- in a pipe --" if width == PIPE else f"-- {width} columns --"


@pytest.mark.parametrize("name", sorted(VIEWS))
def test_the_view_is_the_one_that_was_looked_at(name: str) -> None:
    widths = WIDTHS if name.startswith("help") else (PIPE,) if name == "lines-of-a-pipe" else (*WIDTHS, PIPE)
    text = "\n".join(f"{heading(width)}\n{shown(name, width)}" for width in widths)
    golden = GOLDEN / f"{name}.txt"
    if RENEW:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text, encoding="utf-8")
    assert text == golden.read_text(encoding="utf-8"), "see the docstring of this file for how to renew it"


def test_no_golden_text_is_left_over() -> None:
    assert {file.stem for file in GOLDEN.glob("*.txt")} == set(VIEWS)


@pytest.mark.parametrize(
    "name", sorted(name for name in VIEWS if name not in ("graph", "lines-of-a-pipe", "roles-show"))
)
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_the_terminal(name: str, width: int) -> None:
    """Commands to copy and lines of a file may be longer: they must stay in one piece."""
    for line in shown(name, width).splitlines():
        if "gorgon " not in line and "│" not in line:
            assert cell_len(line) <= width, line


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(
    ("name", "whole"),
    [
        ("runs-ls", [documents.run_id(number) for number in (9, 8, 7, 6, 5, 4)]),
        ("runs-show", [documents.run_id(2), "$0.0977", "16,761 tokens", "12/30", "10.0 s"]),
        ("plan", ["$0.4120", "$130.09", "58,341,246"]),
        ("costs-report", ["$1,204.50"]),
        ("costs-top", ["$1,204.50"]),
        ("budgets-ls", ["$100.00", "$97.40"]),
        ("limits-ls", ["20,000,000", "400,000,000"]),
        ("runs-explain", [documents.run_id(2), "$0.0255"]),
    ],
)
def test_ids_and_numbers_stay_in_one_piece(name: str, whole: list[str], width: int) -> None:
    text = shown(name, width)
    for piece in whole:
        assert piece in text


@pytest.mark.parametrize("name", ["runs-ls", "costs-report", "costs-top", "costs-calls", "budgets-ls", "workflows-ls"])
def test_a_table_in_a_pipe_has_headings_and_is_whole(name: str) -> None:
    with a_screen(PIPE) as printed:
        VIEWS[name]()
    first, *rest = [line.split("\t") for line in printed.getvalue().splitlines() if "\t" in line]
    assert len(first) >= 2
    assert all(first)
    assert {len(row) for row in rest} == {len(first)}
    assert "…" not in "".join(cell for row in rest for cell in row)


def test_documents_are_those_of_the_api() -> None:
    schemas.RunPage.model_validate(documents.page())
    schemas.Estimate.model_validate(documents.estimate())
    schemas.Explanation.model_validate(documents.explanation())
    schemas.CostReport.model_validate(documents.costs("provider", "model"))
    for document in (documents.busy(), documents.key_wait(), documents.ended("failed"), documents.ended("succeeded")):
        schemas.Run.model_validate(document)
    for event in documents.journal():
        schemas.Event.model_validate(event)
    schemas.CallPage.model_validate({"items": documents.calls()})


@pytest.mark.parametrize("path", [path for path in COMMANDS if path])
def test_every_help_ends_with_examples(path: tuple[str, ...]) -> None:
    text = shown("-".join(("help", *path)), 80)
    assert re.search(r"^Examples?:\n(  gorgon .+\n)+\Z", text, re.M), text


@pytest.mark.parametrize("path", COMMANDS)
def test_no_summary_is_cut_and_no_type_leaks(path: tuple[str, ...]) -> None:
    text = shown("-".join(("help", *path)), 80)
    assert "..." not in text.partition("\n")[2]  # but for `[ARGS]...` in the usage
    assert not re.search(r"RANGE|range>|x<=|<=x|x>=|\b(TEXT|INTEGER|FLOAT|BOOLEAN)\b", text)
    assert "{" not in text.partition("\n")[0]
    assert "<int" not in text
