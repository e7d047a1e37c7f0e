"""The commands of the readme and of the quick start, typed in order in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gorgon_common.workflow import catalogue

ROOT = Path(__file__).parents[2]


def commands(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    shown = "\n".join(re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL))
    return re.findall(r"^\$ (.+)$", shown, re.MULTILINE)


def files(page: Path) -> dict[str, str]:
    """The files that the page asks its reader to save: name → text."""
    saved = r"[Ss]ave this as `([^`]+)`:\n\n```yaml\n(.*?)^```"
    return dict(re.findall(saved, page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["README.md", "docs/quickstart.md"])
def test_every_command_works(name: str, tmp_path: Path) -> None:
    page = ROOT / name
    for file, text in files(page).items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    typed = commands(page)
    assert len(typed) >= 4
    for command in typed:
        done = subprocess.run(
            command,
            shell=True,
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "GORGON_SANDBOX_LATENCY": "20ms"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout}{done.stderr}"
        assert done.stdout.strip(), command


def test_a_mistake_looks_as_the_quick_start_says(tmp_path: Path) -> None:
    shown = re.search(r"^```text\n(hello\.yaml:.*?)^```", (ROOT / "docs/quickstart.md").read_text("utf-8"), re.M | re.S)
    assert shown is not None
    text = catalogue.template("minimal").replace("plan.approved", "plan.aproved")
    (tmp_path / "hello.yaml").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "gorgon_common.cli", "validate", "hello.yaml"],
        cwd=tmp_path,
        env={**os.environ, "NO_COLOR": "1", "COLUMNS": "130"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == shown[1]
