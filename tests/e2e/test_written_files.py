"""Files that people write, as `gorgon` reads them: pipes, stdin, data in YAML and JSON, numbers that are none."""

from __future__ import annotations

import io
import json
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pytest

from gorgon_common.cli import main
from gorgon_common.settings import get_settings
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

FLOW = """
name: Echo
inputs: {o: {type: object, default: {}}, n: {type: number, default: 0}}
steps:
  - {id: a, checkpoint: x}
outputs: {o: "{{inputs.o}}", n: "{{inputs.n}}"}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GORGON_SANDBOX_URL", sandbox.url)
    (tmp_path / "f.yaml").write_text(FLOW)
    return tmp_path


@dataclass
class Told:
    """How a command ended, and everything that it said."""

    returncode: int
    stdout: str
    stderr: str


class Gorgon(Protocol):
    def __call__(self, *arguments: str, stdin: str = "") -> Told: ...


@pytest.fixture
def gorgon(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Gorgon:
    """`gorgon …` in this process, through its entry point; `stdin` is what is piped into it."""

    def call(*arguments: str, stdin: str = "") -> Told:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["gorgon", *arguments])
            patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin.encode())))
            get_settings.cache_clear()
            capsys.readouterr()
            with pytest.raises(SystemExit) as ended:
                main()
        get_settings.cache_clear()
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        assert "bug in Gorgon" not in said.err
        return Told(int(ended.value.code or 0), said.out, said.err)

    return call


def strict(text: str) -> Any:
    """The one document of `--json`, which has to be JSON."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} in {text}")

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[str]:
    """The workflow in a pipe, as `<(cat f.yaml)` gives it: it can be read once."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=lambda: path.write_text(FLOW), daemon=True)
    writer.start()
    yield str(path)
    writer.join(timeout=10)


@pytest.mark.parametrize("command", ["validate", "plan", "graph", "run", "fmt"])
def test_a_pipe_is_a_file(gorgon: Gorgon, pipe: str, command: str) -> None:
    done = gorgon(command, pipe)
    assert done.returncode == 0, done.stdout + done.stderr
    if command == "fmt":
        assert done.stdout == gorgon("fmt", "-", stdin=FLOW).stdout


@pytest.mark.parametrize("command", ["validate", "plan", "graph", "run", "fmt"])
def test_a_dash_is_stdin(gorgon: Gorgon, command: str) -> None:
    done = gorgon(command, "-", stdin="\ufeff" + FLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    empty = gorgon(command, "-")
    assert empty.returncode == 2
    assert "The standard input is empty" in empty.stdout + empty.stderr


def test_a_faulty_pipe_is_shown_without_being_read_again(gorgon: Gorgon, tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    threading.Thread(target=lambda: path.write_text("name: w\nsteps: [{id: a, promt: x}]\n"), daemon=True).start()
    done = gorgon("run", str(path))
    assert done.returncode == 2
    assert "promt" in done.stderr
    assert "2 │ steps: [{id: a, promt: x}]" in done.stderr


@pytest.mark.parametrize("arguments", [("--inputs", "-"), ("-i", "o=@-")])
def test_inputs_from_stdin_are_read_as_a_workflow_is(gorgon: Gorgon, arguments: tuple[str, str]) -> None:
    data = "{country: NO, at: 12:30, zip: 01234, day: 2026-11-30, flag: on}"
    text = f"o: {data}\n" if "--inputs" in arguments else data
    done = gorgon("run", "f.yaml", *arguments, "--json", stdin=text)
    expected = {"country": "NO", "at": "12:30", "zip": 1234, "day": "2026-11-30", "flag": "on"}
    assert strict(done.stdout)["outputs"]["o"] == expected, done.stderr


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "1e999"])
def test_a_number_that_is_none_is_refused_at_every_entrance(gorgon: Gorgon, folder: Path, value: str) -> None:
    (folder / "i.json").write_text(f'{{"o": {{"x": [{value}]}}}}')
    for arguments in (("-i", f"n={value}"), ("--inputs", "i.json"), ("-i", "o=@i.json")):
        done = gorgon("run", "f.yaml", *arguments, "--json")
        assert done.returncode == 2, arguments
        strict(done.stdout)
    (folder / "e.yaml").write_text(
        f"name: E\nsteps: [{{id: a, checkpoint: x}}]\noutputs: {{n: \"{{{{double('{value}')}}}}\"}}\n"
    )
    done = gorgon("run", "e.yaml", "--json")
    assert done.returncode == 1
    assert "is not a finite number" in strict(done.stdout)["error"]["message"]
    for arguments in (("limits", "set", "openai", "--requests", value), ("budgets", "set", "org", "--usd", value)):
        assert gorgon(*arguments).returncode == 2, arguments


def test_prices_are_read_as_a_workflow_is(gorgon: Gorgon, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prices = "- {provider: openai, model: NO, from: 2026-01-01, reason: ours, prices: {input: 1, output: .inf}}\n"
    (folder / "p.yaml").write_text("\ufeff" + prices)
    monkeypatch.setenv("GORGON_PRICES", "p.yaml")
    done = gorgon("plan", "f.yaml")
    assert done.returncode == 2
    assert "p.yaml:1:" in done.stderr
    assert "`.inf` is not a number" in done.stderr
    (folder / "p.yaml").write_text("\ufeff" + prices.replace(".inf", "2"))
    assert gorgon("plan", "f.yaml").returncode == 0


def test_a_command_is_tried_again_as_the_file_says(
    gorgon: Gorgon, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORGON_COMMANDS_ALLOW", "*")
    program = f"echo x >> {folder}/log; test $(wc -l < {folder}/log) -ge 3 && echo '{{\"n\": 3}}'"
    text = "name: Again\nsteps:\n  - {id: a, %s, output: {n: number}, run: [sh, -c, %s]}\noutputs: {n: '{{a.n / 2}}'}\n"
    wanted = "on_failure: retry, retry: {max: 2, initial: 1ms}"
    (folder / "a.yaml").write_text(text % (wanted, json.dumps(program)))
    done = gorgon("run", "a.yaml", "--json")
    assert strict(done.stdout)["outputs"] == {"n": 1.5}, done.stdout
    assert (folder / "log").read_text() == "x\n" * 3
    (folder / "log").unlink()
    (folder / "a.yaml").write_text(text % ("retry: {max: 5, initial: 1ms, on: [timeout]}", json.dumps(program)))
    assert gorgon("run", "a.yaml").returncode == 1
    assert (folder / "log").read_text() == "x\n"


def test_the_output_of_a_command_fits_its_schema_or_the_step_fails(
    gorgon: Gorgon, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORGON_COMMANDS_ALLOW", "*")
    for printed, told in (('{"n": "x"}', "n: 'x' is not of type 'number'"), ('{"n": NaN}', "NaN"), ("hi", "not JSON")):
        step = {"id": "a", "run": ["echo", printed], "output": {"n": "number"}}
        (folder / "a.yaml").write_text(json.dumps({"name": "Fit", "steps": [step]}))
        done = gorgon("run", "a.yaml", "--json")
        assert done.returncode == 1
        assert told in strict(done.stdout)["error"]["message"]


def test_an_aggregate_gives_the_outputs_of_the_steps_that_it_names(
    gorgon: Gorgon, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GORGON_COMMANDS_ALLOW", "*")
    (folder / "a.yaml").write_text(
        "name: Join\nsteps:\n  - {id: a, run: [echo, one]}\n  - {id: b, run: [echo, two]}\n"
        "  - {id: c, aggregate: {from: [a, b], how: json}}\noutputs: {c: '{{c.output}}'}\n"
    )
    assert strict(gorgon("run", "a.yaml", "--json").stdout)["outputs"] == {"c": ["one\n", "two\n"]}
