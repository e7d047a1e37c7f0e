"""Following a run; Ctrl-C, once and twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest

from gorgon_common import errors
from gorgon_common.cli.follow import follow


class Script:
    """A run that goes through states, one a look; an exception in the list is raised."""

    def __init__(self, *looks: str | Exception, interrupt_at: int = -1) -> None:
        self.looks, self.interrupt_at = list(looks), interrupt_at
        self.count = 0
        self.cancelled = 0

    def run(self, run_id: str, *, steps: bool = False) -> dict[str, Any]:
        assert steps
        if self.count == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        look = self.looks[min(self.count, len(self.looks) - 1)]
        self.count += 1
        if isinstance(look, Exception):
            raise look
        return {"run_id": run_id, "status": look, "steps": []}

    def cancel(self, run_id: str) -> dict[str, Any]:
        self.cancelled += 1
        return {"run_id": run_id}


class Seen:
    """A view that remembers."""

    def __init__(self) -> None:
        self.states: list[str] = []
        self.said: list[str] = []
        self.closed = False

    def update(self, run: Mapping[str, Any]) -> None:
        self.states.append(run["status"])

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        self.closed = True


def now(_seconds: float) -> None:
    """Waiting that takes no time."""


def test_until_the_end() -> None:
    view = Seen()
    run, interrupted = follow(Script("queued", "running", "succeeded"), "r", view, cancels=True, wait=now)
    assert (run["status"], interrupted) == ("succeeded", False)
    assert view.states == ["queued", "running", "succeeded"]


def test_ctrl_c_cancels_and_goes_on_watching() -> None:
    runs, view = Script("running", "running", "running", "cancelled", interrupt_at=1), Seen()
    before = signal.getsignal(signal.SIGINT)
    run, interrupted = follow(runs, "r", view, cancels=True, wait=now)
    assert (run["status"], interrupted, runs.cancelled) == ("cancelled", True, 1)
    assert "Cancelling" in view.said[0]
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_only_stops_watching_where_the_run_is_not_ours() -> None:
    runs = Script("running", interrupt_at=1)
    run, interrupted = follow(runs, "r", Seen(), cancels=False, wait=now)
    assert (run["status"], interrupted, runs.cancelled) == ("running", True, 0)


def test_a_cancel_that_comes_too_late_is_no_error() -> None:
    class Late(Script):
        def cancel(self, run_id: str) -> dict[str, Any]:
            raise errors.Conflict

    run, _ = follow(Late("running", "succeeded", interrupt_at=0), "r", Seen(), cancels=True, wait=now)
    assert run["status"] == "succeeded"


def test_a_lost_connection_is_waited_for() -> None:
    view = Seen()
    runs = Script("running", errors.Unavailable("gone"), errors.Unavailable("gone"), "succeeded")
    run, _ = follow(runs, "r", view, cancels=True, wait=now)
    assert run["status"] == "succeeded"
    assert "trying again" in view.said[0]


def test_other_errors_end_it() -> None:
    with pytest.raises(errors.NotFound):
        follow(Script(errors.NotFound("gone")), "r", Seen(), cancels=True, wait=now)


def test_the_second_ctrl_c_leaves_at_once_with_130() -> None:
    code = (
        "import os, signal\n"
        "from gorgon_common.cli.follow import follow\n"
        "from gorgon_common.cli.screen import Plain\n"
        "class Stuck:\n"
        "    def run(self, run_id, *, steps=False):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        return {'run_id': 'r', 'workflow': 'w', 'status': 'running', 'steps': []}\n"
        "    def cancel(self, run_id): return {}\n"
        "import threading\n"
        "threading.Thread(target=threading.Event().wait).start()  # a call that cannot be aborted\n"
        "follow(Stuck(), 'r', Plain(), cancels=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr
