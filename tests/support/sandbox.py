"""Starts a real sandbox process: `start_sandbox(**options)`, or the fixture `sandbox`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import pytest

ROOT = Path(__file__).resolve().parents[2]
_HTTP = build_opener(ProxyHandler({}))
"""Connects to the sandbox without a proxy, whatever the environment says."""


@dataclass
class Sandbox:
    """A running sandbox.  Use it as a context manager, or call `stop()`.

    Use `base_url=sandbox.openai_url` for the OpenAI SDK and `base_url=sandbox.url` for Anthropic's.
    """

    url: str
    pid: int
    process: subprocess.Popen[str]

    @property
    def openai_url(self) -> str:
        """The base URL for the OpenAI SDK."""
        return f"{self.url}/v1"

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request to the sandbox itself and return the JSON.  Raises urllib.error.HTTPError."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data=data, method=method)
        with _HTTP.open(request, timeout=10) as response:
            return json.load(response)

    def log(self, **fields: Any) -> list[dict[str, Any]]:
        """Return the requests in its log, oldest first, restricted to those with the given fields (`status=200,
        role="planner"`).
        """
        entries: list[dict[str, Any]] = self.ask("GET", f"/_log?{urlencode(fields)}")["entries"]
        return entries

    def count(self, by: str = "provider,model,status", **fields: Any) -> list[dict[str, Any]]:
        """Return the number of requests for each combination of `by`."""
        groups: list[dict[str, Any]] = self.ask("GET", f"/_log/count?{urlencode({'by': by, **fields})}")["groups"]
        return groups

    def clear_log(self) -> None:
        """Clear the log and the bill."""
        self.ask("DELETE", "/_log")

    def bill(self) -> dict[str, Any]:
        """Return `{account: {provider: {model: {kind: tokens, calls: n}}}}`."""
        bill: dict[str, Any] = self.ask("GET", "/_bill")
        return bill

    def faults(self, *rules: Mapping[str, Any]) -> list[int]:
        """Set faults; return their ids."""
        ids: list[int] = self.ask("POST", "/_faults", list(rules))["ids"]
        return ids

    def clear_faults(self) -> None:
        """Remove all faults and reset the counts of their triggers."""
        self.ask("DELETE", "/_faults")

    def limits(self, *rules: Mapping[str, Any]) -> dict[str, Any]:
        """Set limits (without rules, only read them); return the rules and what every account has left."""
        answer: dict[str, Any] = self.ask("POST", "/_limits", list(rules)) if rules else self.ask("GET", "/_limits")
        return answer

    def clear_limits(self) -> None:
        """Restore the default limits, with every account full."""
        self.ask("DELETE", "/_limits")

    def reset(self) -> None:
        """Reset log, bill, faults and limits."""
        self.clear_log()
        self.clear_faults()
        self.clear_limits()

    def stop(self) -> int:
        """Stop it; return its exit code."""
        self.process.terminate()
        try:
            return self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait(5)
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_sandbox(
    *,
    port: int = 0,
    seed: int = 0,
    latency: str | None = "0",
    limits: Sequence[Mapping[str, Any]] = (),
    faults: Sequence[Mapping[str, Any]] = (),
) -> Sandbox:
    """Start a sandbox on a free port and return it once it answers.  It ends with this process.

    `latency` is the total time of a reply (`500ms`), None for realistic times.  Raises RuntimeError if it does not
    start.
    """
    command = [sys.executable, "-m", "gorgon_api.sandbox", "--port", str(port), "--seed", str(seed)]
    command += ["--exit-with-parent", str(os.getpid())]
    command += ["--latency", latency] if latency is not None else []
    command += ["--limits", json.dumps(list(limits)), "--faults", json.dumps(list(faults))]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GORGON_SANDBOX_")}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    if not url:
        raise RuntimeError(f"the sandbox did not start (exit code {process.wait()})")
    return Sandbox(url, process.pid, process)


@pytest.fixture(scope="session")
def sandbox_process() -> Iterator[Sandbox]:
    """One sandbox without latency for the whole session."""
    with start_sandbox() as running:
        yield running


@pytest.fixture
def sandbox(sandbox_process: Sandbox) -> Sandbox:
    """The session's sandbox with an empty log, no faults and the default limits."""
    sandbox_process.reset()
    return sandbox_process
