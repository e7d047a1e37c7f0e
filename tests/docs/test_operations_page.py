"""The commands of docs/operations.md, in the order of the page, in an empty environment without keys of providers."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.support.processes import GORGON, Process
from tests.support.running import eventually
from tests.support.servers import free_port

PAGE = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
READY = {"api": "Gorgon API at", "worker": r"ready\.$"}


def answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


class Operator:
    """Types what the page says; what the page starts in the background ends with the test."""

    def __init__(self, environment: Mapping[str, str], replaced: Mapping[str, str]) -> None:
        self.environment = dict(environment)
        self.replaced = replaced
        self.processes: list[Process] = []

    def follow(self, block: str) -> None:
        """Type the lines of a block.  Lines with --live need keys, which nobody has here."""
        for line in block.splitlines():
            text = line.partition("#")[0].strip()
            if text.startswith("export ") or "--live" in text or not text:
                continue
            for documented, here in self.replaced.items():
                text = text.replace(documented, here)
            words = shlex.split(text.removesuffix("&"))
            extra = dict(word.split("=", 1) for word in words[: words.index("gorgon")])
            arguments = words[words.index("gorgon") + 1 :]
            if arguments[0] == "sandbox":  # prints its address to stdout
                self.processes.append(Process(*arguments, ready="$^", environment=self.environment))
                eventually(lambda: answers(int(self.environment["GORGON_SANDBOX_PORT"])), within=30)
            elif arguments[0] in READY:
                environment = {**self.environment, **extra}
                self.processes.append(Process(*arguments, ready=READY[arguments[0]], environment=environment))
                self.processes[-1].wait_ready()
            else:
                done = self.call(*arguments)
                assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"

    def call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        kept = {"PATH": "/usr/bin:/bin", "GORGON_ENV_FILE": "", **self.environment}
        return subprocess.run(
            [*GORGON, *arguments], env=kept, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )


@pytest.fixture
def operator(postgres_admin: str, postgres_url: str, redis_url: str, tmp_path: Path) -> Iterator[Operator]:
    api, sandbox = free_port(), free_port()
    environment = {
        "GORGON_DATABASE_URL": postgres_url,
        "GORGON_REDIS_URL": redis_url,
        "GORGON_API_KEY": "gk_of_the_operator",
        "GORGON_HOME": str(tmp_path / "home"),
        "GORGON_API_PORT": str(api),
        "GORGON_SANDBOX_PORT": str(sandbox),
        "GORGON_SANDBOX_LATENCY": "20ms",
    }
    made = Operator(environment, {"127.0.0.1:8000": f"127.0.0.1:{api}"})
    yield made
    for process in reversed(made.processes):
        process.terminate()


def test_the_page_can_be_followed_without_keys(operator: Operator) -> None:
    first, sandbox, *rest = BLOCKS
    assert "export GORGON_DATABASE_URL" in first
    assert "gorgon sandbox" in sandbox
    operator.follow(first)
    doctor = operator.call("doctor")
    assert doctor.returncode == 1
    assert "Start it: gorgon sandbox" in doctor.stdout
    operator.follow(sandbox)
    doctor = operator.call("doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert "Everything that is needed works." in doctor.stdout
    for block in rest:
        operator.follow(block)
    assert all(process.alive for process in operator.processes)
