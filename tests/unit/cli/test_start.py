"""Starting: fast, complete, and never with a traceback."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest

from gorgon_common import errors, lazy
from gorgon_common.cli import commands
from tests.unit.cli.conftest import Gorgon

HEAVY = {
    "sqlalchemy",
    "celery",
    "openai",
    "anthropic",
    "fastapi",
    "httpx2",
    "yaml",
    "rich.console",
    "structlog",
}

"""Not pydantic: typer itself takes it as soon as a command has parameters."""


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gorgon_common.cli", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def computed() -> float:
    """Return the seconds of CPU that ended children have used: other work on the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_takes_less_than_half_a_second() -> None:
    times = []
    for _ in range(5):
        before = computed()
        assert run("--help").returncode == 0
        times.append(computed() - before)
    assert min(times) < 0.5, times


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["runs", "ls", "--help"], ["api", "--help"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from gorgon_common.cli import build\n"
        f"try: build()({arguments!r})\n"
        "except SystemExit as e: assert e.code == 0\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == "[]"


def test_help_lists_every_command_under_its_heading(gorgon: Gorgon) -> None:
    text = gorgon("--help").stdout
    shown = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.strip()}
    assert shown >= {
        *("init", "demo", "validate", "fmt", "graph", "schema", "run", "runs", "workflows", "roles", "doctor"),
        *("api", "sandbox", "worker", "db"),
    }
    for heading in ("Begin:", "Write workflows:", "Run them:", "Look things up:", "Servers and upkeep:"):
        assert heading in text


@pytest.mark.parametrize("group", [["runs"], ["workflows"], ["roles"], ["db"], []])
def test_a_group_without_a_command_shows_its_help(gorgon: Gorgon, group: list[str]) -> None:
    result = gorgon(*group)
    assert result.exit_code == 2
    assert "Usage:" in result.output


def test_every_command_has_help_and_takes_json_where_it_answers(gorgon: Gorgon) -> None:
    for command in (["run"], ["runs", "ls"], ["runs", "show"], ["runs", "watch"], ["runs", "logs"], ["runs", "cancel"],
                    ["runs", "resume"], ["validate"], ["graph"], ["doctor"], ["roles", "ls"], ["roles", "show"],
                    ["workflows", "ls"], ["workflows", "show"], ["db", "upgrade"]):  # fmt: skip
        assert "--json" in gorgon(*command, "--help").stdout, command


def test_a_misspelt_command_is_suggested(gorgon: Gorgon) -> None:
    result = gorgon("validat")
    assert result.exit_code == 2
    assert "Did you mean 'validate'" in result.output


def test_version_is_printed(gorgon: Gorgon) -> None:
    assert gorgon("--version").stdout.startswith("gorgon ")


class TestErrors:
    @pytest.fixture
    def raising(self, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
        """`gorgon doctor` raises what is put into this list."""
        wanted: list[Exception] = []

        def load(_name: str) -> object:
            raise wanted[0]

        real = lazy.load
        monkeypatch.setattr(commands.lazy, "load", lambda name: load(name) if name.endswith(":doctor") else real(name))
        return wanted

    def test_of_ours_become_a_sentence_a_hint_and_2(self, gorgon: Gorgon, raising: list[Exception]) -> None:
        raising.append(errors.NotFound("There is no such thing.", hint="Look elsewhere."))
        result = gorgon("doctor")
        assert result.exit_code == 2
        assert result.stderr == "Error: There is no such thing.\nLook elsewhere.\n"
        assert result.stdout == ""

    def test_with_json_stdout_is_one_document(self, gorgon: Gorgon, raising: list[Exception]) -> None:
        raising.append(errors.WorkflowInvalid([errors.Problem("wrong", file="f.yaml", line=3, column=1)]))
        result = gorgon("doctor", "--json")
        document = json.loads(result.stdout)
        assert document["error"]["problems"][0]["line"] == 3
        assert "f.yaml:3:1: error: wrong" in result.stderr

    def test_a_fault_of_ours_is_a_sentence_and_70(self, gorgon: Gorgon, raising: list[Exception]) -> None:
        raising.append(KeyError("x"))
        result = gorgon("doctor")
        assert result.exit_code == 70
        assert "KeyError: 'x'" in result.stderr
        assert "Traceback" not in result.output
        assert "--debug" in result.stderr

    def test_debug_shows_where(self, gorgon: Gorgon, raising: list[Exception]) -> None:
        raising.append(KeyError("x"))
        assert isinstance(gorgon("--debug", "doctor").exception, KeyError)


def test_no_color_and_pipes_have_no_escapes() -> None:
    for environment in ({"NO_COLOR": "1", "FORCE_COLOR": ""}, {}):
        done = run("validate", "nothere.yaml", **environment)
        assert done.returncode == 2
        assert "\x1b" not in done.stdout + done.stderr


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m gorgon_common.cli schema | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "{\n"
    assert done.stderr == ""


def test_completion_knows_the_commands() -> None:
    done = run(_GORGON_COMPLETE="complete_bash", COMP_WORDS="gorgon runs re", COMP_CWORD="2")
    assert done.stdout.split() == ["resume"]
    done = run(_GORGON_COMPLETE="complete_bash", COMP_WORDS="gorgon val", COMP_CWORD="1")
    assert done.stdout.split() == ["validate"]
