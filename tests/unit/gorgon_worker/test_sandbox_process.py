"""A sandbox of one's own: it answers, and it ends with whoever started it."""

from __future__ import annotations

import subprocess
import sys
from urllib.request import urlopen

import psutil
import pytest

from gorgon_common.errors import Unavailable
from gorgon_common.settings import Settings
from gorgon_worker import sandbox_process
from gorgon_worker.sandbox_process import SandboxProcess


def test_it_answers_and_ends() -> None:
    with SandboxProcess(Settings(sandbox_latency=0.0)) as sandbox:
        with urlopen(f"{sandbox.url()}/_log/count", timeout=5) as answer:
            assert answer.status == 200
        process = psutil.Process(sandbox.pid)
    assert not process.is_running()


def test_it_ends_where_its_parent_is_killed() -> None:
    code = (
        "import os, signal\n"
        "from gorgon_common.settings import Settings\n"
        "from gorgon_worker.sandbox_process import SandboxProcess\n"
        "sandbox = SandboxProcess(Settings())\n"
        "print(sandbox.url(), sandbox.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=30, check=False
    ).stdout
    pid = int(said.split()[1])
    if psutil.pid_exists(pid):
        psutil.Process(pid).wait(5)


def test_one_that_does_not_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox_process, "MODULE", "gorgon_api.no_such_module")
    with SandboxProcess(Settings()) as sandbox, pytest.raises(Unavailable, match="no_such_module"):
        sandbox.url()
