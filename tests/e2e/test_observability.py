"""What processes say of themselves: logs, metrics, Flower and Celery's own commands, of real worker processes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.support.processes import Cluster, Process, cluster
from tests.support.running import eventually
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.servers import free_port

__all__ = ["sandbox", "sandbox_process"]

KEY = "gk_of_these_tests"
TRIES = """
name: tries
steps:
  - {id: plan, role: planner, provider: openai, prompt: Plan}
  - {id: bad, role: builder, provider: openai, retry: {max: 2, initial: 10ms, jitter: none}, prompt: "{{plan.output}}"}
"""
SAMPLES = (
    'gorgon_runs_total{status="failed",target="sandbox",team="default",workflow="tries"}',
    'gorgon_steps_total{kind="agent",queue="openai",status="succeeded",workflow="tries"}',
    'gorgon_steps_total{kind="agent",queue="openai",status="failed",workflow="tries"}',
    'gorgon_step_retries_total{queue="openai",reason="server"}',
    'gorgon_step_seconds_count{kind="agent",queue="openai"}',
    "gorgon_calls_total{",
    "gorgon_tokens_total{",
    "gorgon_cost_usd_total{",
    'gorgon_slots_busy{queue="openai"}',
)


@pytest.fixture(scope="module")
def place(
    sqlite_template: Path,
    redis_server_url: str,
    sandbox_process: Sandbox,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("observed")
    with cluster(f"sqlite:///{folder}/gorgon.db", redis_server_url, sandbox_process, folder) as made:
        made.environment.update(GORGON_API_KEY=KEY, GORGON_LOG_FORMAT="json", GORGON_LOG_LEVEL="info")
        yield made


@pytest.fixture(scope="module")
def worker(place: Cluster) -> Process:
    process = Process(
        "worker",
        *("--slots", "4", "--metrics-port", "0", "--events", "-q", "openai"),
        ready='"worker.ready"',
        environment=place.environment,
    )
    place.processes.append(process)
    process.wait_ready()
    return process


def lines(process: Process) -> list[dict[str, Any]]:
    """Every line that it has written; each is JSON."""
    return [json.loads(line) for line in process.said]


def test_a_step_that_failed_three_times_leaves_three_lines(place: Cluster, worker: Process, sandbox: Sandbox) -> None:
    sandbox.faults({"role": "builder", "status": 500})
    ran = place.run(TRIES)
    assert ran.status == "failed"
    eventually(lambda: [line for line in worker.said if '"run.failed"' in line])
    about = [line for line in lines(worker) if line.get("run_id") == ran.id]
    told = [
        (line["event"], line["attempt"]) for line in about if line.get("step") == "bad" and line["level"] == "warning"
    ]
    assert told == [("step.retry", 1), ("step.retry", 2), ("step.failed", 3)]
    assert all("HTTP 500" in line["error"] for line in about if line["level"] == "warning")
    assert {line["trace_id"] for line in about} == {ran.document["trace_id"]}
    ended = [line["event"] for line in about if line.get("step") == "plan" and line["logger"] == "gorgon"]
    assert ended == ["step.started", "call.settled", "step.succeeded"]
    assert not any("Task gorgon" in line["event"] for line in lines(worker)), "Celery would call it succeeded"
    url = next(line["url"] for line in lines(worker) if line["event"] == "worker.metrics")
    assert url.startswith("http://127.0.0.1:")
    text = httpx2.get(url).text
    for sample in SAMPLES:
        assert sample in text, sample
    assert httpx2.get(url.replace("/metrics", "/")).status_code == 404


def test_celerys_own_commands_and_flower(
    place: Cluster, worker: Process, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    celery = [sys.executable, "-m", "celery", "-A", "gorgon_worker.app"]
    for name, value in place.environment.items():
        monkeypatch.setenv(name, value)
    asked = subprocess.run([*celery, "status"], capture_output=True, text=True, timeout=60, check=False)
    assert "OK" in asked.stdout, asked.stdout + asked.stderr
    port = free_port()
    flower = Process("flower", "--port", str(port), ready="Flower at", environment=place.environment)
    try:
        flower.wait_ready()
        url = f"http://127.0.0.1:{port}/api"

        def status() -> int:
            try:
                return httpx2.get(f"{url}/tasks").status_code
            except httpx2.TransportError:
                return 0

        assert eventually(status, within=60) == 401, "behind a password"

        def names() -> set[str]:
            # Flower shows what happens from when it listens, which nothing tells.
            place.run("name: seen\nsteps: [{id: it, role: planner, provider: openai, prompt: x}]\n")
            tasks = httpx2.get(f"{url}/tasks", auth=("gorgon", KEY)).json()
            return {task["name"] for task in tasks.values() if task["state"] == "SUCCESS"}

        assert eventually(lambda: "gorgon.agent[planner] seen/it" in names(), within=30)
    finally:
        flower.terminate()
    assert KEY not in "".join(flower.said)


def test_a_worker_of_celerys_own_command(place: Cluster, sandbox: Sandbox) -> None:
    refused = subprocess.run(
        [sys.executable, "-m", "celery", "-A", "gorgon_worker.app", "worker", "-Q", "openai"],
        env={**place.environment, "PATH": "/usr/bin:/bin", "GORGON_ENV_FILE": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 2
    assert "-Q openai,control" in refused.stderr


def test_the_api_has_samples_and_lines(place: Cluster, worker: Process, sandbox: Sandbox) -> None:
    api = Process("api", "--port", "0", ready="Gorgon API at", environment=place.environment)
    try:
        api.wait_ready()
        found = re.search(r"http://\S+", api.line)
        assert found is not None
        with httpx2.Client(base_url=found[0], headers={"X-API-Key": KEY}) as http:
            made = http.post(
                "/v1/runs", json={"source": "name: seen\nsteps: [{id: it, provider: openai, prompt: x}]\n"}
            )
            run_id = made.json()["run_id"]
            place.wait(run_id)
            text = http.get("/metrics").text
        assert 'gorgon_runs_accepted_total{target="sandbox",team="default",workflow="seen"} 1.0' in text
        assert 'gorgon_worker_slots{queue="openai",target="sandbox"} 4.0' in text
        assert 'gorgon_http_requests_total{method="POST",route="/v1/runs",status="202"} 1.0' in text
        said = [json.loads(line) for line in api.said if line.startswith("{")]
        assert [line["run_id"] for line in said if line["event"] == "run.created"] == [run_id]
        assert next(line["status"] for line in said if line["event"] == "request") == 202
    finally:
        api.terminate()
