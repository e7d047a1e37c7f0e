"""Whether the process of a home still lives."""

from __future__ import annotations

import subprocess
import sys

from gorgon_worker.process_owner import is_deserted, new_home


def test_every_home_is_new_and_this_process_lives() -> None:
    first, second = new_home(), new_home()
    assert first != second
    assert not is_deserted(first)
    assert len(first) <= 100  # the column


def test_a_process_that_ended_has_left() -> None:
    code = "from gorgon_worker.process_owner import new_home; print(new_home())"
    home = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert is_deserted(home)


def test_a_pid_that_was_given_away_again_is_another_process() -> None:
    host, pid, started, rest = new_home().split(":")
    assert is_deserted(f"{host}:{pid}:{int(started) + 1}:{rest}")


def test_of_another_machine_nothing_is_known() -> None:
    _, rest = new_home().split(":", 1)
    assert not is_deserted(f"elsewhere:{rest}")
    assert not is_deserted("home_01K")
    assert not is_deserted("")
