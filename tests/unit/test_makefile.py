"""`make` on machines that lack something says what to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder of programs to use as PATH, without Python and uv, and the files that make reads."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("sh", "sed", "make", "rm", "touch", "printf", "cat"):
        found = shutil.which(name)
        assert found is not None
        (tools / name).symlink_to(found)
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def program(machine: Path, name: str, text: str) -> None:
    path = machine / "bin" / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def make(machine: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # MAKEFLAGS would bring in what the make that runs this test was told
    environment = {"PATH": str(machine / "bin"), "HOME": str(machine)}
    return subprocess.run(["make", *arguments], cwd=machine, env=environment, capture_output=True, text=True)


def test_help_is_what_make_alone_prints(machine: Path) -> None:
    done = make(machine)
    assert done.returncode == 0
    assert [line.split()[1] for line in done.stdout.splitlines()][:6] == [
        "help", "demo", "test", "check", "fmt", "bench",
    ]  # fmt: skip


def test_without_python(machine: Path) -> None:
    done = make(machine, "test")
    assert done.returncode != 0
    assert "Gorgon needs Python 3.11, 3.12 or 3.13; python3 here is: " in done.stderr
    assert "apt-get install python3" in done.stderr


def test_with_a_python_that_is_too_old(machine: Path) -> None:
    program(machine, "python3", '[ "$1" = -V ] && echo Python 3.8.10; exit 1')
    done = make(machine, "demo")
    assert done.returncode != 0
    assert "python3 here is: Python 3.8.10" in done.stderr


@pytest.mark.parametrize("there", [True, False])
def test_with_a_python_that_was_named(machine: Path, there: bool) -> None:
    if there:
        program(machine, "python3.9", '[ "$1" = -V ] && echo Python 3.9.1; exit 1')
    done = make(machine, "test", "PYTHON=python3.9")
    assert done.returncode != 0
    said = "PYTHON=python3.9 is Python 3.9.1: Gorgon needs" if there else "PYTHON=python3.9: there is no such program"
    assert said in done.stderr


def test_without_the_venv_module(machine: Path) -> None:
    program(machine, "python3", '[ "$1" = -m ] && exit 1; exit 0')
    done = make(machine, "test")
    assert done.returncode != 0
    assert "apt-get install python3-venv" in done.stderr


def test_what_is_set_up_is_not_set_up_again(machine: Path) -> None:
    program(machine, "python3", "echo called >&2; exit 1")
    folder = machine / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "gorgon").symlink_to(shutil.which("printf") or "")
    for name in ("requirements.lock", "pyproject.toml"):
        os.utime(machine / name, (1_000, 1_000))
    (folder / ".ready").touch()
    done = make(machine, "demo")
    assert (done.returncode, done.stdout, done.stderr) == (0, "demo", "")
    os.utime(folder / ".ready", (500, 500))  # the lock is newer
    assert make(machine, "demo").returncode != 0


@pytest.mark.parametrize("variable", ["PYTHONDONTWRITEBYTECODE", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"])
def test_variables_that_would_disturb_are_not_passed_on(machine: Path, variable: str) -> None:
    program(machine, "env", "exit 0")
    (machine / "Makefile").write_text(f'{(ROOT / "Makefile").read_text()}\nshow:\n\t@printf "<%s>" "$${variable}"\n')
    done = subprocess.run(
        ["make", "show"], cwd=machine, env={"PATH": str(machine / "bin"), variable: "1"}, capture_output=True, text=True
    )
    assert done.stdout == "<>"


def test_ci_runs_what_people_run() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    check, test, again = (line.strip() for line in script.splitlines() if re.match(r" *(if ! )?make ", line))
    assert check == "make check"
    assert test == 'if ! make test | tee "$summary"; then'
    assert again.startswith("make test WORKERS=0 ARGS='--last-failed")  # what failed, once more, alone
    assert script.splitlines()[-1] == 'tail -n 1 "$summary"'  # pytest's own last line
