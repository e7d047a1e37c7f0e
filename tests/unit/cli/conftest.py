"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from gorgon_common.cli import build

Gorgon = Callable[..., Result]


@pytest.fixture
def gorgon() -> Gorgon:
    """Call `gorgon` with arguments; `stdin` is what it reads."""

    def call(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(build(), list(arguments), input=stdin, prog_name="gorgon")

    return call
