"""`gorgon` as a person types it: real processes, the real engine, the sandbox."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from gorgon_common.client import schemas
from tests.support.running import eventually
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

GORGON = [sys.executable, "-m", "gorgon_common.cli"]
SNIPPET = """
name: Feature Build
steps:
  - id: plan
    role: planner
    prompt: "Analyze feature requirements"
  - id: build
    role: builder
    depends_on: [plan]
    condition:
      field: plan.approved
      operator: equals
      value: true
"""
CHAIN = """
name: chain
inputs: {word: {type: string, default: tea}, times: {type: integer, default: 1}}
steps:
  - {id: one, role: planner, prompt: "Plan {{inputs.word}} {{inputs.times}}"}
  - {id: two, role: builder, prompt: "Build {{one.output}}"}
  - {id: three, role: tester, prompt: "Test {{two.output}}"}
outputs: {plan: "{{one.output}}", word: "{{inputs.word}}"}
"""
GROUP = """
name: nested
steps:
  - id: both
    steps:
      - {id: left, role: builder, prompt: left}
      - {id: right, role: builder, prompt: right}
  - id: many
    depends_on: [both]
    role: builder
    map: {over: ["a", "b", "c"], as: it}
    prompt: "{{it}}"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> Path:
    """An empty folder with the files above; every run uses the session's sandbox."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GORGON_SANDBOX_URL", sandbox.url)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)  # every start would compile everything again
    for name, text in (("snippet", SNIPPET), ("chain", CHAIN), ("nested", GROUP)):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def gorgon(*arguments: str, timeout: float = 60, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GORGON, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def run_json(*arguments: str, code: int = 0, **environment: str) -> dict[str, Any]:
    done = gorgon("run", *arguments, "--json", **environment)
    assert done.returncode == code, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    schemas.Run.model_validate(document)
    return document


def steps(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["id"]: step for step in document["steps"]}


class TestRun:
    def test_the_first_snippet(self) -> None:
        document = run_json("snippet.yaml")
        assert document["status"] == "succeeded"
        done = steps(document)
        assert done["plan"]["output"]["approved"] is True
        assert done["build"]["status"] == "succeeded"
        assert done["plan"]["tokens"]["output"] > 0
        assert document["cost_usd"] > 0

    def test_the_document_has_exactly_the_fields_that_are_published(self) -> None:
        document = run_json("chain.yaml")
        needed = {"run_id", "workflow", "status", "outputs", "error", "cost_usd", "tokens", "started_at", "finished_at"}
        assert needed | {"steps"} <= document.keys()
        for step in document["steps"]:
            assert set(schemas.Step.model_fields) <= step.keys()
            schemas.Step.model_validate(step)
            for name in ("started_at", "finished_at"):
                assert len(step[name]) == len("2026-11-22T09:30:00.112233Z")

    def test_inputs_are_typed(self) -> None:
        document = run_json("chain.yaml", "-i", "word=4", "-i", "times=2")
        assert document["outputs"]["word"] == "4"

    def test_the_same_document_again_from_runs_show(self) -> None:
        document = run_json("chain.yaml")
        again = gorgon("runs", "show", document["run_id"], "--json")
        assert json.loads(again.stdout) == document

    def test_a_pipe_gets_plain_lines(self) -> None:
        done = gorgon("run", "chain.yaml")
        assert done.returncode == 0, done.stderr
        assert "\x1b" not in done.stdout + done.stderr
        lines = done.stdout.splitlines()
        ended = [line.split()[0] for line in lines if " succeeded " in line and not line.startswith("✓")]
        assert ended == ["one", "two", "three"]
        assert any(line.startswith("✓ chain succeeded") for line in lines)
        assert "sandbox" in done.stderr

    def test_a_run_leaves_no_process_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("GORGON_SANDBOX_URL")
        process = subprocess.Popen(
            [*GORGON, "run", "chain.yaml"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        children: set[psutil.Process] = set()
        assert process.stdout is not None
        for _ in process.stdout:
            with contextlib.suppress(psutil.NoSuchProcess):
                children |= set(psutil.Process(process.pid).children(recursive=True))
        process.communicate(timeout=30)
        assert process.returncode == 0
        assert children, "the sandbox is a process of its own"
        _, alive = psutil.wait_procs(children, timeout=5)
        assert alive == []

    def test_a_bundled_workflow_in_another_folder(self) -> None:
        document = run_json("feature-build")
        agents = [step for step in document["steps"] if step["kind"] == "agent"]
        assert len(agents) >= 5
        assert {step["item"] for step in document["steps"] if step["id"] == "build"} >= {0, 1}


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["chain.yaml", "-i", "times=many"], "must be an integer"),
            (["chain.yaml", "-i", "wrod=a"], "`wrod` is not an input"),
            (["gone.yaml"], "There is no file gone.yaml"),
            (["chain.yaml", "--inputs", "gone.json"], "There is no file gone.json"),
            (["chain.yaml", "--server", "http://127.0.0.1:9"], "cannot be reached"),
            (["chain.yaml", "--detach"], "GORGON_REDIS_URL"),
        ],
    )
    def test_is_2_a_sentence_and_no_run(self, arguments: list[str], told: str) -> None:
        done = gorgon("run", *arguments)
        assert done.returncode == 2, done.stdout + done.stderr
        assert told in done.stderr
        assert "Traceback" not in done.stderr
        assert json.loads(gorgon("runs", "ls", "--json").stdout)["items"] == []

    def test_live_without_a_key_names_the_variables_before_anything_starts(self) -> None:
        done = gorgon("run", "chain.yaml", "--live")
        assert done.returncode == 2
        assert "ANTHROPIC_API_KEY" in done.stderr
        assert "OPENAI_API_KEY" in done.stderr
        assert json.loads(gorgon("runs", "ls", "--json").stdout)["items"] == []

    def test_steps_that_cannot_run_yet_are_refused_before_anything_starts(self, folder: Path) -> None:
        asks = "  - {id: later, depends_on: now, approval: Go on?}\n"
        (folder / "w.yaml").write_text("name: w\nsteps:\n  - {id: now, checkpoint: now}\n" + asks)
        assert gorgon("validate", "w.yaml").returncode == 0
        done = gorgon("run", "w.yaml")
        assert done.returncode == 2
        assert "later" in done.stderr
        assert json.loads(gorgon("runs", "ls", "--json").stdout)["items"] == []

    def test_a_broken_setting_is_named(self) -> None:
        done = gorgon("run", "chain.yaml", GORGON_SLOTS="many")
        assert done.returncode == 2
        assert "GORGON_SLOTS" in done.stderr


class TestFailure:
    def test_says_why_and_how_to_resume_and_the_resume_works(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "builder", "status": 400, "message": "no such thing"})
        done = gorgon("run", "chain.yaml")
        assert done.returncode == 1, done.stdout + done.stderr
        assert "✗ chain failed" in done.stdout
        resume = next(line for line in done.stdout.splitlines() if "gorgon runs resume" in line)
        run_id = resume.split()[-1]
        assert "two  failed" in done.stdout
        sandbox.clear_faults()
        sandbox.clear_log()
        again = gorgon("runs", "resume", run_id, "--json")
        assert again.returncode == 0, again.stdout + again.stderr
        document = json.loads(again.stdout)
        assert document["run_id"] != run_id
        assert document["outputs"]["plan"]["approved"] is True
        assert sandbox.log(role="planner") == [], "what was finished is not paid again"

    def test_json_is_still_one_document(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "builder", "status": 400, "message": "no such thing"})
        document = run_json("chain.yaml", code=1)
        assert document["status"] == "failed"
        assert document["error"]
        assert steps(document)["two"]["status"] == "failed"
        assert "no such thing" in json.dumps(steps(document)["two"]["error"])


def started(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*GORGON, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(process: subprocess.Popen[str], text: str) -> str:
    """Read its stdout until a line has the text."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} did not come: {seen}{process.stderr.read() if process.stderr else ''}")


class TestCtrlC:
    def test_cancels_the_run_and_is_130(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "builder", "delay": 20})
        process = started("run", "chain.yaml")
        seen = until(process, "two  running")
        begun = time.monotonic()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=15)
        assert time.monotonic() - begun < 8
        assert process.returncode == 130, out + err
        assert "Traceback" not in err
        assert "chain cancelled" in out
        run_id = seen.split()[0]
        document = json.loads(gorgon("runs", "show", run_id, "--json").stdout)
        assert document["status"] == "cancelled"
        assert steps(document)["one"]["status"] == "succeeded"
        assert steps(document)["three"]["status"] == "cancelled"

    def test_twice_leaves_at_once(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "builder", "hang": True})
        process = started("run", "chain.yaml")
        until(process, "two  running")
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)  # two signals at the same moment are one
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=5)
        assert process.returncode == 130, out + err
        assert "Traceback" not in err

    def test_another_terminal_can_cancel_it(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "builder", "delay": 20})
        process = started("run", "chain.yaml")
        run_id = until(process, "two  running").split()[0]
        done = gorgon("runs", "cancel", run_id)
        assert done.returncode == 0, done.stderr
        out, err = process.communicate(timeout=15)
        assert process.returncode == 1, out + err
        assert "chain cancelled" in out

    def test_a_closed_pipe_cancels_the_run(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "builder", "delay": 20})
        process = started("run", "chain.yaml")
        assert process.stdout is not None
        run_id = process.stdout.readline().split()[0]
        process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read()
        process.wait(15)
        process.stderr.close()
        assert "Traceback" not in said
        assert json.loads(gorgon("runs", "show", run_id, "--json").stdout)["status"] == "cancelled"

    def test_a_killed_run_is_resumed_and_nothing_is_paid_twice(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "tester", "delay": 20})
        process = started("run", "chain.yaml")
        run_id = until(process, "three  running").split()[0]
        process.kill()
        process.communicate()
        sandbox.clear_faults()
        sandbox.clear_log()
        done = gorgon("runs", "resume", run_id)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 reused" in done.stderr
        assert {entry["role"] for entry in sandbox.log()} == {"tester"}


@contextlib.contextmanager
def terminal(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[bytes], list[bytes]]]:
    """Run it on a terminal of 100 columns; gives the process and what it has drawn."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [*GORGON, *arguments],
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30", **environment},
        stdin=child,
        stdout=child,
        stderr=child,
        start_new_session=True,
    )
    os.close(child)
    drawn: list[bytes] = []

    def read() -> None:
        while True:
            with contextlib.suppress(OSError):
                if select.select([parent], [], [], 0.2)[0]:
                    data = os.read(parent, 65_536)
                    if data:
                        drawn.append(data)
                        continue
            if process.poll() is not None:
                return

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield process, drawn
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        reader.join()
        os.close(parent)


class TestTerminal:
    def test_a_live_tree_with_the_end_below(self) -> None:
        with terminal("run", "nested.yaml") as (process, drawn):
            assert process.wait(60) == 0
        text = b"".join(drawn).decode()
        assert "\x1b[" in text
        assert "✓" in text
        assert "3/3" in text
        assert "nested succeeded" in text
        assert text.count("\x1b[?25l") == text.count("\x1b[?25h") >= 1, "the cursor is given back"

    def test_no_color(self) -> None:
        with terminal("runs", "ls", NO_COLOR="1") as (process, drawn):
            assert process.wait(30) == 0
        assert b"\x1b[3" not in b"".join(drawn)


def test_doctor_finds_everything_well_and_says_what_is_not(folder: Path) -> None:
    well = gorgon("doctor", "--json")
    assert well.returncode == 0, well.stdout + well.stderr
    report = json.loads(well.stdout)
    assert report["ok"] is True
    assert {"GORGON_DATABASE_URL", "GORGON_REDIS_URL", "ANTHROPIC_API_KEY"} <= {
        setting["variable"] for setting in report["settings"]
    }
    ill = gorgon(
        "doctor", GORGON_REDIS_URL="redis://127.0.0.1:9/0", GORGON_SLOT="3", ANTHROPIC_API_KEY="sk-ant-" + "x" * 40
    )
    assert ill.returncode == 1
    assert "GORGON_SLOT is not a setting of Gorgon" in ill.stdout
    assert "Is it running?" in ill.stdout
    assert "x" * 10 not in ill.stdout


def test_db_upgrade_says_where() -> None:
    done = gorgon("db", "upgrade")
    assert done.returncode == 0, done.stderr
    assert "up to date" in done.stdout
    assert gorgon("db", "upgrade").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("which", ["parallel", "cost", "limits", "roles", "resume"])
def test_demos_end_well(which: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GORGON_SANDBOX_URL")
    done = gorgon("demo", which, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr


class TestWhatIsSaidAboutRuns:
    def test_a_failed_run_offers_to_continue_with_the_edited_file(self, tmp_path: Path) -> None:
        file = tmp_path / "broken run.yaml"
        file.write_text("name: R\nsteps:\n  - {id: a, run: [sh, -c, 'exit 3']}\n")
        failed = gorgon("run", str(file), GORGON_COMMANDS_ALLOW="*")
        assert failed.returncode == 1
        assert "a: The command exited with status 3" in failed.stdout
        offered = next(line for line in failed.stdout.splitlines() if " -f " in line)
        file.write_text(file.read_text().replace("exit 3", "echo ok"))
        again = gorgon(*shlex.split(offered)[1:], GORGON_COMMANDS_ALLOW="*")
        assert again.returncode == 0, again.stdout + again.stderr

    def test_a_killed_run_is_listed_as_such(self, sandbox: Sandbox) -> None:
        sandbox.faults({"role": "builder", "delay": 20})
        process = started("run", "chain.yaml", GORGON_LEASE_SECONDS="1")
        assert process.stdout is not None
        assert process.stderr is not None
        run_id = process.stdout.readline().split()[0]
        process.kill()
        process.wait(15)
        process.stdout.close()
        process.stderr.close()
        eventually(
            lambda: json.loads(gorgon("runs", "ls", "--json").stdout)["items"][0].get("orphaned"),
            what="the lease's end",
        )
        listed = gorgon("runs", "ls")
        assert listed.stdout.splitlines()[0].split("\t")[:4] == ["run", "workflow", "status", "target"]
        assert f"{run_id}\tchain\tdied\tsandbox" in listed.stdout
        assert f"gorgon runs resume {run_id}" in listed.stderr
        watched = gorgon("runs", "watch", run_id)
        assert watched.returncode == 3
        assert f"has died. To continue it: gorgon runs resume {run_id}" in watched.stderr
        assert "The run goes on" not in watched.stderr

    def test_a_command_starts_in_its_folder(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        (tmp_path / "c.yaml").write_text(
            "name: C\ninputs: {folder: string}\nsteps:\n"
            "  - {id: here, run: [cat, notes.txt], cwd: .}\n"
            '  - {id: there, run: [cat, notes.txt], cwd: "{{inputs.folder}}"}\n'
            '  - {id: empty, run: [sh, -c, \'ls -A; test "$HOME" = "$PWD"\']}\n'
            'outputs: {all: "{{here.stdout}} {{there.stdout}} <{{empty.stdout}}>"}\n'
        )
        document = run_json("c.yaml", "-i", f"folder={tmp_path}", GORGON_COMMANDS_ALLOW="*")
        assert document["outputs"]["all"] == "hello hello <>"


def on_a_terminal(*arguments: str, columns: int) -> str:
    with terminal(*arguments, COLUMNS=str(columns)) as (process, drawn):
        assert process.wait(60) == 0
    text = b"".join(drawn).decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "")


@pytest.mark.parametrize("width", [60, 80])
def test_a_real_terminal_shows_ids_in_one_piece(width: int) -> None:
    run_id = run_json("chain.yaml")["run_id"]
    for arguments in (["runs", "ls"], ["runs", "show", "last"], ["runs", "explain", "last"], ["costs", "top"]):
        text = on_a_terminal(*arguments, columns=width)
        if arguments[0] == "runs":
            assert run_id in text, text
        for line in text.splitlines():
            assert len(line.rstrip()) <= width or "gorgon " in line, line
