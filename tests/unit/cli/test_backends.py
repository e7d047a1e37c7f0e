"""For whom a command acts."""

from __future__ import annotations

import pytest

from gorgon_common.cli.backends import person
from gorgon_common.scope import Scope


def test_a_command_acts_for_the_person_at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "ann")
    assert person() == Scope(1, None, "cli:ann")


def test_a_user_without_a_name_has_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000_001)  # no such user, as in a container
    assert person().actor == "cli:4000000001"
