"""Faults of the environment: exit code 2, what and where and what to do; work that succeeds still succeeds."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from gorgon_common.cli import build
from gorgon_common.settings import get_settings
from tests.support.processes import cluster
from tests.support.running import eventually
from tests.support.sandbox import Sandbox, sandbox_process

__all__ = ["sandbox_process"]

GORGON = [sys.executable, "-m", "gorgon_common.cli"]
HELLO = 'name: Hello\nsteps:\n  - {id: a, run: [echo, "café → ✓"]}\noutputs: {a: "{{a.output}}"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "hello.yaml").write_text(HELLO, encoding="utf-8")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("GORGON_COMMANDS_ALLOW", "*")
    monkeypatch.delenv("GORGON_ENV_FILE")
    # A process that may write no more could not store its coverage either, and would say so with a traceback.
    monkeypatch.delenv("COVERAGE_PROCESS_START", raising=False)
    return tmp_path


def gorgon(*arguments: str, **environment: str) -> Result:
    """Call a command in this process."""
    get_settings.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        return CliRunner().invoke(build(), list(arguments), prog_name="gorgon")


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Call a command in a process of its own."""
    given = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "timeout": 120, "check": False, **options}
    return subprocess.run([*GORGON, *arguments], stdin=subprocess.DEVNULL, **given)


def refused(done: Result | subprocess.CompletedProcess[bytes], *words: str) -> None:
    """Exit code 2; stdout holds one JSON document, stderr the same in words, and neither a traceback."""
    code = done.exit_code if isinstance(done, Result) else done.returncode
    told = done.stderr if isinstance(done.stderr, str) else done.stderr.decode()
    assert code == 2, told
    assert "Traceback" not in told
    assert "bug in Gorgon" not in told
    error = json.loads(done.stdout)["error"]
    assert error["hint"]
    for word in words:
        assert word in error["message"] + error["hint"], error
        assert word in told


ENCODINGS = {
    "latin-1": {"PYTHONIOENCODING": "latin-1"},
    "gbk": {"PYTHONIOENCODING": "gbk"},
    "ascii": {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
}


SEVERAL = """
import sys
from gorgon_common.cli import build, streams
streams.prepare()
for command in sys.argv[1:]:
    try:
        build()(command.split(), prog_name="gorgon")
    except SystemExit as end:
        assert end.code == 0, command
"""


@pytest.mark.parametrize("name", ENCODINGS)
def test_output_of_any_encoding(name: str) -> None:
    commands = ["validate hello.yaml", "graph hello.yaml", "run hello.yaml", "run hello.yaml --json"]
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL, *commands],
        env={**os.environ, **ENCODINGS[name]},
        capture_output=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(name)
    assert ("✓ " in text) is (name == "utf-8")
    assert "Hello succeeded" in text
    assert json.loads(text[text.rindex("\n{\n") :])["outputs"] == {"a": "café → ✓\n"}
    if name == "ascii":
        assert "+ Hello succeeded" in text
        assert r"caf\xe9 -> +" in text


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
def test_an_environment_file_of_any_encoding(encoding: str) -> None:
    Path(".env").write_bytes("# café\nGORGON_API_PORT=x1\n".encode(encoding))
    read = encoding in ("utf-8-sig", "utf-16")
    refused(gorgon("runs", "ls", "--json"), *(["GORGON_API_PORT"] if read else [".env", "line 1", "UTF-8"]))


def test_an_environment_file_that_is_none() -> None:
    Path(".env").mkdir()
    refused(gorgon("runs", "ls", "--json"), ".env", "directory")
    refused(gorgon("runs", "ls", "--json", GORGON_ENV_FILE="/no/such.env"), "/no/such.env", "GORGON_ENV_FILE")
    assert gorgon("runs", "ls", "--json", GORGON_ENV_FILE="").exit_code == 0


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/nowhere", "~nobody-of-this-name/x"])
def test_a_home_that_cannot_be_made(folder: Path, place: str) -> None:
    (folder / "file").write_text("x")
    home = place if place[0] in "/~" else str(folder / place)
    refused(gorgon("runs", "ls", "--json", GORGON_HOME=home), place, "GORGON_HOME")
    assert gorgon("doctor", GORGON_HOME=home).exit_code == 2


@pytest.mark.parametrize("name", ["a?b", "a#b", "a%b", "a%3Fb", "a b", ":memory:", "ü"])
def test_a_home_of_any_name(folder: Path, name: str) -> None:
    home = folder / name
    assert gorgon("runs", "ls", "--json", GORGON_HOME=str(home)).exit_code == 0
    assert [path.name for path in home.iterdir()] == ["gorgon.db"]
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert stat.S_IMODE((home / "gorgon.db").stat().st_mode) == 0o600


def test_a_working_directory_that_is_gone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "gone").mkdir()
    monkeypatch.chdir(folder / "gone")
    (folder / "gone").rmdir()
    assert gorgon("runs", "ls", "--json").exit_code == 0
    refused(gorgon("runs", "ls", "--json", GORGON_HOME="relative"), "GORGON_HOME", "absolute")


def damaged(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(os.urandom(32 * 1024))


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda file: file.write_text("garbage"), "not a SQLite database"),
        (damaged, "damaged"),
        (lambda file: (file.unlink(), file.mkdir()), "is a folder"),
    ],
)
def test_a_database_that_is_damaged(folder: Path, spoil: Callable[[Path], object], word: str) -> None:
    file = folder / "home" / "gorgon.db"
    assert gorgon("runs", "ls").exit_code == 0
    for extra in file.parent.glob("gorgon.db-*"):
        extra.unlink()
    spoil(file)
    refused(gorgon("runs", "ls", "--json"), str(file), word)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:x?mode=memory&uri=true"])
def test_a_database_in_memory(url: str) -> None:
    refused(gorgon("runs", "ls", "--json", GORGON_DATABASE_URL=url), "GORGON_DATABASE_URL", "in memory")


def test_a_url_that_cannot_be_read_shows_no_password() -> None:
    done = gorgon("runs", "ls", "--json", GORGON_DATABASE_URL="postgresql://me:canary-password@h:port/x")
    refused(done, "GORGON_DATABASE_URL")
    assert "canary" not in done.output


def test_a_disk_that_is_full(folder: Path) -> None:
    """A limit of the size of files is what a test can have of a full disk without being root."""
    limit = (64 * 1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    done = process("runs", "ls", "--json", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    refused(done, str(folder / "home" / "gorgon.db"), "disk", "GORGON_HOME")


def limit_files(pid: int, size: int) -> None:
    """Let a running process make no file larger."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_disk_that_becomes_full_while_a_run_is_under_way(folder: Path, interrupted: bool) -> None:
    started, gate = folder / "started", folder / "gate"
    os.mkfifo(gate)
    script = f"echo > {started}; cat {gate}"
    Path("slow.yaml").write_text(
        f"name: slow\nsteps:\n  - {{id: a, run: [sh, -c, '{script}']}}\n  - {{id: b, run: [echo, b], depends_on: a}}\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([*GORGON, "run", "slow.yaml", "--json"], **pipes) as running:
        eventually(started.exists, within=30)
        limit_files(running.pid, 1024)
        if interrupted:
            running.send_signal(signal.SIGTERM)
        opened = os.open(gate, os.O_RDWR)
        os.close(opened)
        output, told = running.communicate(timeout=60)
    done = subprocess.CompletedProcess(running.args, running.returncode, output, told)
    refused(done, str(folder / "home" / "gorgon.db"), "disk", "GORGON_HOME", "gorgon runs resume run_")
    assert told.count(b"Error:") == 1
    gate.unlink()
    gate.write_text("later")
    again = gorgon("runs", "resume", "last", "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["status"] == "succeeded"


def test_a_worker_waits_for_room_and_ends_when_told(
    folder: Path, sqlite_template: Path, redis_server_url: str, sandbox_process: Sandbox
) -> None:
    started, gate = folder / "started", folder / "gate"
    os.mkfifo(gate)
    text = f"name: slow\nsteps:\n  - {{id: a, run: [sh, -c, 'echo > {started}; cat {gate}']}}\n"
    with cluster(f"sqlite:///{folder}/gorgon.db", redis_server_url, sandbox_process, folder) as made:
        made.environment["GORGON_GRACE_SECONDS"] = "3"
        worker = made.worker("command")
        run = made.start(text)
        eventually(started.exists, within=30)
        limit_files(worker.pid, 1024)
        os.close(os.open(gate, os.O_RDWR))
        eventually(lambda: "the disk reports an error" in "".join(worker.said), within=30)
        limit_files(worker.pid, resource.RLIM_INFINITY)
        assert made.wait(run).status == "succeeded"
        started.unlink()
        made.start(text)
        eventually(started.exists, within=30)
        limit_files(worker.pid, 1024)
        os.close(os.open(gate, os.O_RDWR))
        begun = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait(30) == 1, "a step is left to its lease"
        assert time.monotonic() - begun < 20
    waits = [line for line in worker.said if "reports an error" in line and re.search("held|heartbeat|sweep", line)]
    assert len(waits) == 1, "once a minute"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("command", ["runs ls --json", "schema"])
def test_output_that_cannot_be_written(command: str) -> None:
    with open("/dev/full", "wb") as full:
        done = process(*command.split(), stdout=full)
    assert done.returncode == 2, done.stderr
    assert b"The output cannot be written: No space left on device." in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_temporary_folder_that_is_missing() -> None:
    assert gorgon("run", "hello.yaml", "--json", TMPDIR="/no/such/folder").exit_code == 0


@pytest.mark.parametrize("command", [["runs", "ls", "--bogus"], ["runs", "ls", "-n", "0"], ["runs", "show"]])
def test_with_json_a_wrong_call_prints_a_document(command: list[str]) -> None:
    done = gorgon(*command, "--json")
    assert done.exit_code == 2
    assert json.loads(done.stdout)["error"]["message"]


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_a_disk_that_is_read_only(folder: Path) -> None:
    mount = folder / "mount"
    mount.mkdir()
    script = (
        f"mount -t tmpfs -o size=4m none {mount} && {sys.executable} -m gorgon_common.cli runs ls >/dev/null"
        f" && mount -o remount,ro {mount} && exec {sys.executable} -m gorgon_common.cli runs ls --json"
    )
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script],
        env={**os.environ, "GORGON_HOME": str(mount / "home")},
        capture_output=True,
        timeout=60,
        check=False,
    )
    if done.returncode not in (0, 2):
        pytest.skip(f"no mount namespaces here: {done.stderr.decode()[:200]}")
    refused(done, str(mount), "read-only", "GORGON_HOME")
