"""The Python of docs/library.md, run as it stands."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from tests.support.memory_services import MemoryServices

PAGE = Path(__file__).parents[2] / "docs" / "library.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
PRINTED = {
    "cost_tracker": "0.0015\n",
    "RateLimitedParallelExecutor": "a report on orders {} () 0\n",
    "Client": "queued\n",
}
ADDRESS = "http://127.0.0.1:8000"


@pytest.fixture
def server() -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0))
    application = create_app(MemoryServices(), SingleKey("gk_example"))
    server = uvicorn.Server(uvicorn.Config(application, log_config=None, timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def test_every_example_is_run() -> None:
    assert len(BLOCKS) == len(PRINTED)


@pytest.mark.parametrize("name", PRINTED)
def test_the_example_does_what_it_says(name: str, server: str, tmp_path: Path) -> None:
    (code,) = (block for block in BLOCKS if f"import {name}" in block)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code.replace(ADDRESS, server)],
        env={**os.environ, "GORGON_HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, PRINTED[name]), done.stderr
