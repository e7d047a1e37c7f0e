"""The seam between `gorgon run` and the worker's package, which it finds by name: both sides agree."""

from __future__ import annotations

import inspect

import pytest

from gorgon_common.cli import in_process
from gorgon_worker import local


def declared(kind: type) -> list[str]:
    return [name for name, value in vars(kind).items() if inspect.isfunction(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", declared(in_process.Local))
def test_the_functions_take_what_the_command_gives(name: str) -> None:
    wanted = list(inspect.signature(getattr(in_process.Local, name)).parameters.values())[1:]
    found = list(inspect.signature(getattr(local, name)).parameters.values())
    assert [(entry.name, entry.kind) for entry in found] == [(entry.name, entry.kind) for entry in wanted]


def test_the_worker_has_what_the_command_asks() -> None:
    assert set(declared(in_process.LocalWorker)) == {"cancel", "trouble"}
    assert all(callable(getattr(local.LocalWorker, name)) for name in ("cancel", "trouble"))
    assert isinstance(local.LocalWorker.given_up, property)
    assert {"url", "__enter__", "__exit__"} <= set(dir(local.SandboxProcess))
