"""Every example of `--help` can be run as it stands there."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

from gorgon_common.cli import build
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

SERVES = ("worker", "api", "sandbox", "flower", "demo")
"""Commands that serve until they are stopped, or take long: their examples are only parsed."""
FIRST = ("init", "validate", "schema", "fmt", "run")


def examples(command: Any) -> Iterator[list[str]]:
    """Yield the words of every example of a command and of the commands in it."""
    for line in (getattr(command, "epilog", None) or "").splitlines():
        if line.startswith("gorgon "):
            yield shlex.split(line)[1:]
    for inner in getattr(command, "commands", {}).values():
        yield from examples(inner)


def test_they_all_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sandbox: Sandbox) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GORGON_SANDBOX_URL", sandbox.url)
    every = list(examples(typer.main.get_command(build())))
    assert len(every) > 40
    # A file is written first, then it is run; what follows looks at the last run.
    every.sort(key=lambda words: FIRST.index(words[0]) if words[0] in FIRST else len(FIRST))
    for words in every:
        if words[0] in SERVES:
            typer.main.get_command(build()).make_context("gorgon", [*words], resilient_parsing=False)
            continue
        result = CliRunner().invoke(build(), words, prog_name="gorgon")
        ended = "already succeeded" in result.stderr  # the run that `cancel` and `signal` name
        late = words[:2] in (["runs", "cancel"], ["runs", "signal"]) and ended
        assert result.exit_code == 0 or late, (words, result.output)
