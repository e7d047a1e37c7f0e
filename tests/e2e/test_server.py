"""`gorgon api` and `gorgon worker` as processes of their own, on Redis, used by `gorgon … --server`."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from gorgon_common.client import schemas
from gorgon_common.client.http import Client
from tests.support.sandbox import Sandbox, sandbox, sandbox_process

__all__ = ["sandbox", "sandbox_process"]

GORGON = [sys.executable, "-m", "gorgon_common.cli"]
KEY = "gk_of_this_test"
CHAIN = """
name: chain
inputs: {word: {type: string, default: tea}}
steps:
  - {id: one, role: planner, prompt: "Plan {{inputs.word}}"}
  - {id: two, role: builder, prompt: "Build {{one.output}}"}
  - {id: three, role: tester, prompt: "Test {{two.output}}"}
outputs: {plan: "{{one.output}}"}
"""


@contextmanager
def serving(*arguments: str, ready: str, **environment: str) -> Iterator[str]:
    """Run a server until the end of the block; gives the line of stderr that says it is ready."""
    process = subprocess.Popen(
        [*GORGON, *arguments],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    seen = []
    drain = threading.Thread(target=process.stderr.read, daemon=True)
    try:
        for line in process.stderr:
            seen.append(line)
            if re.search(ready, line):
                break
        else:
            raise AssertionError("".join(seen))
        drain.start()
        yield line
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if drain.is_alive():
            drain.join(5)
        process.stderr.close()


@pytest.fixture
def settings(
    redis_url: str, postgres_url: str, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chain.yaml").write_text(CHAIN)
    for name, value in {
        "GORGON_REDIS_URL": redis_url,
        "GORGON_DATABASE_URL": postgres_url,
        "GORGON_SANDBOX_URL": sandbox.url,
        "GORGON_API_KEY": KEY,
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)


@pytest.fixture
def url(settings: None) -> Iterator[str]:
    with serving("api", "--port", "0", ready="Gorgon API at") as line:
        found = re.search(r"http://\S+", line)
        assert found is not None
        yield found[0]


@pytest.fixture
def worker(settings: None) -> Iterator[None]:
    with serving("worker", GORGON_LOG_LEVEL="info", ready=r"\bready\b"):
        yield


def gorgon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GORGON, *arguments], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=90, check=False
    )


def run_json(*arguments: str) -> dict[str, Any]:
    done = gorgon("run", *arguments, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    schemas.Run.model_validate(document)
    return document


@pytest.mark.slow
def test_a_run_on_a_server_with_a_worker(url: str, worker: None) -> None:
    there = run_json("chain.yaml", "--server", url)
    assert there["status"] == "succeeded"
    assert [step["status"] for step in there["steps"]] == ["succeeded"] * 3
    here = run_json("chain.yaml")
    assert here["outputs"] == there["outputs"], "the same file gives the same result embedded and distributed"
    shown = gorgon("runs", "show", there["run_id"], "--server", url, "--json")
    assert json.loads(shown.stdout) == there
    plain = gorgon("run", "chain.yaml", "--server", url)
    assert plain.returncode == 0
    assert "three  succeeded" in plain.stdout
    detached = gorgon("run", "chain.yaml", "--detach")
    assert detached.returncode == 0, detached.stdout + detached.stderr
    assert gorgon("runs", "watch", detached.stdout.strip()).returncode == 0


@pytest.mark.slow
def test_the_journal_streams_and_ends(url: str, worker: None) -> None:
    with Client(url, api_key=KEY) as client:
        run_id = client.submit(source=CHAIN, inputs={})["run_id"]
        events = list(client.events(run_id))
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "run.queued"
    assert kinds[-1] == "run.succeeded"
    assert [event["step"] for event in events if event["kind"] == "step.succeeded"] == ["one", "two", "three"]
    assert [event["seq"] for event in events] == sorted({event["seq"] for event in events})


def test_ctrl_c_cancels_the_run_on_the_server(url: str, worker: None, sandbox: Sandbox) -> None:
    sandbox.faults({"role": "builder", "delay": 20})
    process = subprocess.Popen(
        [*GORGON, "run", "chain.yaml", "--server", url], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    run_id = ""
    for line in process.stdout:
        run_id = run_id or line.split()[0]
        if "two  running" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130, out + err
    with Client(url, api_key=KEY) as client:
        assert client.run(run_id)["status"] == "cancelled"


def test_without_a_key_on_loopback_one_is_made_up_and_printed(settings: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GORGON_API_KEY")
    with serving("api", "--port", "0", ready="key of this start") as line:
        key = line.split()[-1]
        assert key.startswith("gk_")


def test_a_request_while_streams_are_open(url: str) -> None:
    """An open stream holds no thread and no transaction while nothing happens."""
    with Client(url, api_key=KEY) as client, httpx2.Client(base_url=url, headers={"X-API-Key": KEY}) as http:
        run_id = client.submit(source=CHAIN, inputs={})["run_id"]
        streams = [http.stream("GET", f"/v1/runs/{run_id}/events") for _ in range(60)]
        opened = [stream.__enter__() for stream in streams]
        assert {response.status_code for response in opened} == {200}
        assert client.run(run_id)["run_id"] == run_id
        for stream in streams:
            stream.__exit__(None, None, None)
