"""What a newcomer does wrong, and what they are told by `gorgon validate` and `gorgon run`.

Nothing here ends in a traceback.  What can be known before a run starts is exit code 2, what shows on the way is 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gorgon_common.cli import main
from gorgon_common.settings import get_settings
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

CLOSED = "http://127.0.0.1:9"
"""Nobody listens on the port of `discard`."""


@dataclass
class Told:
    """How a command ended, and everything that it said."""

    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


Gorgon = Callable[..., Told]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GORGON_SANDBOX_URL", sandbox.url)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    return tmp_path


def checked(told: Told) -> Told:
    assert "Traceback" not in told.all, told.all
    assert "bug in Gorgon" not in told.all, told.all
    return told


@pytest.fixture
def gorgon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gorgon:
    """`gorgon …` in this process, through its entry point: a process for each would take minutes."""

    def call(*arguments: str, **environment: str) -> Told:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["gorgon", *arguments])
            for name, value in environment.items():
                patch.setenv(name, value)
            get_settings.cache_clear()
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
        get_settings.cache_clear()
        said = capsys.readouterr()
        return checked(Told(int(ended.value.code or 0), said.out, said.err))

    return call


def process(*arguments: str, **environment: str) -> Told:
    """`gorgon …` as a process."""
    done = subprocess.run(
        [sys.executable, "-m", "gorgon_common.cli", *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return checked(Told(done.returncode, done.stdout, done.stderr))


BAD_FILES = {
    "broken YAML": (
        'name: w\nsteps:\n  - {id: a, prompt: "one"\n  - {id: b, prompt: two}\n',
        ["w.yaml:3:5", "is not closed", "Add `}`"],
    ),
    "a tab": ("name: w\nsteps:\n\t- id: a\n", ["w.yaml:3:1", "tab", "Indent with spaces"]),
    "unknown key": (
        "name: w\nsteps:\n  - {id: a, promt: one}\n",
        ["w.yaml:3:13", "unknown key `promt`", "Did you mean `prompt`?"],
    ),
    "duplicate key": (
        "name: w\nsteps:\n  - id: a\n    prompt: one\n    prompt: two\n",
        ["w.yaml:5:5", "`prompt` is written twice", "line 4"],
    ),
    "alias bomb": (
        "name: w\n"
        + "".join(
            f"{name}: &{name} [{', '.join([f'*{before}' if before else 'x'] * 9)}]\n"
            for before, name in zip(["", *"abcdefgh"], "abcdefghi", strict=True)
        )
        + "steps: [{id: a, prompt: x}]\n",
        ["w.yaml:2:4", "anchors (`&a`) are not allowed", "aliases (`*a`) are not allowed", "Write the value out"],
    ),
    "unknown step": (
        'name: w\nsteps:\n  - {id: plan, role: planner}\n  - {id: b, prompt: "{{plann.output}}"}\n',
        ["w.yaml:4:24", "nothing called `plann`", "Did you mean `plan`?"],
    ),
    "unknown input": (
        'name: w\ninputs: {topic: {type: string}}\nsteps:\n  - {id: b, prompt: "{{inputs.topik}}"}\n',
        ["w.yaml:4:31", "no input `topik`", "Did you mean `topic`?"],
    ),
    "unknown field": (
        'name: w\nsteps:\n  - {id: plan, role: planner}\n  - {id: b, prompt: "{{plan.aproved}}"}\n',
        ["w.yaml:4:29", "no field `aproved`", "Did you mean `approved`?"],
    ),
    "unknown role": (
        "name: w\nsteps:\n  - {id: plan, role: planer}\n",
        ["w.yaml:3:", "planer", "Did you mean `planner`?"],
    ),
    "cycle": (
        (
            'name: w\nsteps:\n  - {id: a, prompt: "{{c.output}}"}\n  - {id: b, prompt: "{{a.output}}"}\n'
            '  - {id: c, prompt: "{{b.output}}"}\n'
        ),
        ["w.yaml:3:5", "a → c → b → a", "remove one"],
    ),
    "braces without quotes": (
        "name: w\ninputs: {x: {type: string}}\nsteps:\n  - id: a\n    prompt: {{inputs.x}}\n",
        ["w.yaml:5:13", '"{{inputs.x}}"'],
    ),
    "empty": ("", ["w.yaml:1:1", "empty", "`name:` and `steps:`"]),
    "a list": ("- a\n- b\n", ["w.yaml:1:1", "mapping", "Begin with `name:`"]),
    "secret in a prompt": (
        'name: w\nsecrets: [TOKEN]\nsteps:\n  - {id: a, prompt: "{{secrets.TOKEN}}"}\n',
        ["w.yaml:4:24", "secret", "env:"],
    ),
    "free text compared": (
        (
            "name: w\nsteps:\n  - {id: a, prompt: x}\n"
            "  - {id: b, prompt: y, condition: {field: a.output, operator: equals, value: yes}}\n"
        ),
        ["w.yaml:4:", "output:"],
    ),
}


class TestFiles:
    @pytest.mark.parametrize("name", BAD_FILES)
    def test_validate_says_where_what_and_what_to_do(self, name: str, folder: Path, gorgon: Gorgon) -> None:
        text, expected = BAD_FILES[name]
        (folder / "w.yaml").write_text(text)
        told = gorgon("validate", "w.yaml")
        assert told.code == 2, told.all
        for part in expected:
            assert part in told.all, told.all
        assert len(told.all) < 4000, "nobody reads more"

    def test_a_process_ends_with_the_code_and_the_message_on_stderr(self, folder: Path) -> None:
        (folder / "w.yaml").write_text(BAD_FILES["unknown step"][0])
        told = process("run", "w.yaml")
        assert (told.code, told.out) == (2, "")
        assert "nothing called `plann`" in told.err

    @pytest.mark.parametrize("name", ["broken YAML", "alias bomb", "unknown step", "cycle"])
    def test_run_says_the_same_and_starts_nothing(
        self, name: str, folder: Path, sandbox: Sandbox, gorgon: Gorgon
    ) -> None:
        text, expected = BAD_FILES[name]
        (folder / "w.yaml").write_text(text)
        told = gorgon("run", "w.yaml")
        assert told.code == 2, told.all
        for part in expected:
            assert part in told.err
        assert "Nothing was started." in told.err
        assert told.out == ""
        assert sandbox.log() == []

    def test_several_problems_are_told_at_once_also_to_machines(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(
            'name: w\nsteps:\n  - {id: a, promt: x, prompt: "{{gone.output}}"}\n  - {id: b, role: planer}\n'
        )
        told = gorgon("validate", "w.yaml", "--json")
        assert told.code == 2
        document = json.loads(told.out)
        assert document["valid"] is False
        assert {(problem["line"], problem["column"]) for problem in document["problems"]} == {(3, 13), (4, 19)}
        assert all(problem["message"] and problem["file"] == "w.yaml" for problem in document["problems"])

    def test_a_file_that_is_not_there(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "flow.yaml").write_text("name: w\n")
        told = gorgon("run", "folw.yaml")
        assert told.code == 2
        assert "There is no file folw.yaml." in told.err
        assert "flow.yaml" in told.err

    def test_a_workflow_that_is_not_there(self, gorgon: Gorgon) -> None:
        told = gorgon("run", "feature-buidl")
        assert told.code == 2
        assert "feature-build" in told.err


INPUTS = """
name: w
inputs:
  times: {type: integer, required: true, description: How often}
  kind: {type: string, enum: [a, b], default: a}
  files: {type: array, items: {type: string}, max_items: 2, default: []}
steps: [{id: it, prompt: "{{inputs.times}}"}]
"""


class TestInputs:
    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ([], ["The input `times` is missing (How often)", "-i times=VALUE"]),
            (["-i", "times=many"], ["'times' must be an integer", "'many'", "-i times=3"]),
            (["-i", "times=2.5"], ["`times`", "2.5"]),
            (["-i", "times=1", "-i", "kind=c"], ["`kind`", "'c' is not one of ['a', 'b']"]),
            (["-i", "times=1", "-i", "tims=2"], ["`tims` is not an input", "Did you mean `times`?"]),
            (["-i", "times=1", "-i", 'files=["a", 1]'], ["`files[1]`", "not of type 'string'"]),
            (["-i", "times=1", "-i", 'files=["a", "b", "c"]'], ["`files`", "too long"]),
            (["-i", "times"], ["NAME=VALUE"]),
            (["--inputs", "gone.json"], ["There is no file gone.json"]),
        ],
    )
    def test_are_checked_before_anything_starts(
        self, given: list[str], expected: list[str], folder: Path, sandbox: Sandbox, gorgon: Gorgon
    ) -> None:
        (folder / "w.yaml").write_text(INPUTS)
        told = gorgon("run", "w.yaml", *given)
        assert told.code == 2, told.all
        for part in expected:
            assert part in told.err, told.err
        assert sandbox.log() == []

    def test_several_faults_are_listed(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(INPUTS)
        told = gorgon("run", "w.yaml", "-i", "kind=c", "-i", "tims=2")
        assert told.code == 2
        assert "The inputs do not fit the workflow:" in told.err
        assert told.err.count("\n  - ") == 3


OPENAI = 'name: w\nsteps: [{id: it, provider: openai, prompt: "go", retry: {max: 1, initial: 10ms}}]\n'
ANTHROPIC = OPENAI.replace("openai", "anthropic")


def step(prompt: str = "go", more: str = "") -> str:
    return f'name: w\nsteps: [{{id: it, prompt: "{prompt}", max_retries: 0{more}}}]\n'


class TestProviders:
    @pytest.mark.parametrize(("text", "variable"), [(OPENAI, "OPENAI_API_KEY"), (ANTHROPIC, "ANTHROPIC_API_KEY")])
    def test_a_missing_key(self, text: str, variable: str, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(text)
        told = gorgon("run", "w.yaml", "--live")
        assert told.code == 2
        assert f"--live needs {variable}" in told.err
        assert "without --live the sandbox is used" in told.err
        assert told.out == ""

    def test_a_server_that_cannot_be_reached(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(OPENAI)
        told = gorgon("run", "w.yaml", "--live", OPENAI_BASE_URL=f"{CLOSED}/v1", OPENAI_API_KEY="sk-x")
        assert told.code == 1
        assert f"Cannot reach the OpenAI-compatible server at {CLOSED}/v1" in told.all
        assert "OPENAI_BASE_URL" in told.all
        assert "gorgon runs resume run_" in told.all

    @pytest.mark.parametrize(
        ("text", "key", "url"),
        [(OPENAI, "OPENAI_API_KEY", "OPENAI_BASE_URL"), (ANTHROPIC, "ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL")],
    )
    @pytest.mark.parametrize(("value", "why"), [("bad-key", "does not accept the API key"), ("broke-x", "no credit")])
    def test_a_key_that_is_refused(
        self, text: str, key: str, url: str, value: str, why: str, folder: Path, sandbox: Sandbox, gorgon: Gorgon
    ) -> None:
        (folder / "w.yaml").write_text(text)
        base = sandbox.openai_url if key.startswith("OPENAI") else sandbox.url
        told = gorgon("run", "w.yaml", "--live", **{key: value, url: base})
        assert told.code == 1
        assert why in told.all
        assert key in told.all, "the variable to look at"
        assert value not in told.all, "a key is not shown"
        assert len(sandbox.log()) == 1, "it is not tried again"

    def test_an_unknown_model(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(step(more=", model: unknown-model"))
        told = gorgon("run", "w.yaml")
        assert told.code == 1
        assert "no model 'unknown-model'" in told.all
        assert "fast, standard, strong" in told.all

    def test_a_reply_that_misses_its_schema(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(
            step("[[sandbox: wrong_schema]] go", ", output: {title: string, count: integer}")
        )
        told = gorgon("run", "w.yaml")
        assert told.code == 1
        assert "does not fit the output schema after 2 rounds of repair" in told.all
        assert "'count' is a required property" in told.all
        assert "stronger model" in told.all

    def test_a_refusal(self, folder: Path) -> None:
        (folder / "w.yaml").write_text(step("[[sandbox: refuse]] go"))
        told = process("run", "w.yaml")
        assert told.code == 1
        assert "declined to answer: I'm sorry" in told.all
        assert "Change the prompt." in told.all

    @pytest.mark.parametrize(
        ("text", "hint"),
        [
            (step("[[sandbox: huge=11MB]] go"), "max_tokens"),
            ("name: w\nsteps: [{id: it, run: [head, -c, '11000000', /dev/zero]}]\n", ""),
        ],
    )
    def test_an_output_of_more_than_10_mb(self, text: str, hint: str, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(text)
        told = gorgon("run", "w.yaml", GORGON_COMMANDS_ALLOW="head")
        assert told.code == 1
        assert "10 MB" in told.all
        assert hint in told.all

    def test_as_a_machine_reads_it(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(step("[[sandbox: refuse]] go"))
        told = gorgon("run", "w.yaml", "--json")
        assert told.code == 1
        document = json.loads(told.out)
        assert document["status"] == "failed"
        assert document["error"]["kind"] == "refused"
        assert document["error"]["hint"]
        assert told.err == ""


class TestServers:
    def test_a_server_of_ours_that_is_not_there(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(OPENAI)
        told = gorgon("run", "w.yaml", "--server", CLOSED)
        assert told.code == 2
        assert f"The server {CLOSED} cannot be reached" in told.err
        assert "gorgon api" in told.err

    def test_a_sandbox_that_is_not_there(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(OPENAI)
        told = gorgon("run", "w.yaml", GORGON_SANDBOX_URL=CLOSED)
        assert told.code == 1
        assert "Cannot reach the sandbox" in told.all
        assert "gorgon sandbox" in told.all

    def test_a_database_that_is_not_there(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text(OPENAI)
        told = gorgon("run", "w.yaml", GORGON_DATABASE_URL="postgresql://someone:s3cret@127.0.0.1:9/gorgon")
        assert told.code == 2
        assert "The database cannot be used" in told.err
        assert "GORGON_DATABASE_URL" in told.err
        assert "s3cret" not in told.all

    def test_a_command_that_is_not_allowed(self, folder: Path, gorgon: Gorgon) -> None:
        (folder / "w.yaml").write_text("name: w\nsteps: [{id: it, run: [ls]}]\n")
        off = gorgon("run", "w.yaml")
        assert off.code == 1
        assert "Commands are off" in off.all
        assert "GORGON_COMMANDS_ALLOW=ls" in off.all
        other = gorgon("run", "w.yaml", GORGON_COMMANDS_ALLOW="git")
        assert other.code == 1
        assert "'ls' is not among the commands" in other.all
        assert "GORGON_COMMANDS_ALLOW=git,ls" in other.all

    def test_a_worker_without_a_broker(self, gorgon: Gorgon) -> None:
        told = gorgon("worker")
        assert told.code == 2
        assert "GORGON_REDIS_URL" in told.err
