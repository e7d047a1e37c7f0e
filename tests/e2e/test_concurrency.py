"""Concurrency keys as people meet them: here, on a cluster, through the API, and after a `kill -9`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from gorgon_api.app import create_app
from gorgon_api.auth import SingleKey
from gorgon_common.client import schemas
from gorgon_common.client.http import Client
from gorgon_common.errors import Conflict, InputInvalid
from gorgon_common.persistence.tables import runs
from tests.support.processes import GORGON, cluster
from tests.support.running import Lab, eventually, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.servers import fresh_database

__all__ = ["sandbox", "sandbox_process"]

ALONE = """
name: alone
inputs: {folder: string, secs: {type: string, default: "0.2"}}
concurrency: {key: "{{inputs.folder}}", on_conflict: queue}
steps:
  - {id: lock, run: [mkdir, "{{inputs.folder}}"]}
  - {id: work, run: [sleep, "{{inputs.secs}}"], depends_on: lock}
  - {id: unlock, run: [rmdir, "{{inputs.folder}}"], depends_on: work}
"""
"""`mkdir` fails where another run is between its two ends: a witness that knows nothing of keys."""
SLOW = """
name: slow
inputs: {text: {type: string, default: "[[sandbox: delay=30s]] go"}}
concurrency: {key: one, on_conflict: queue}
steps:
  - {id: ask, prompt: "{{inputs.text}}", timeout: 60s}
"""


def other(text: str, on_conflict: str) -> str:
    return text.replace("on_conflict: queue", f"on_conflict: {on_conflict}")


@pytest.fixture(scope="module")
def lab(sandbox_process: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(tmp_path_factory.mktemp("lab"), sandbox_process) as made:
        yield made


def test_runs_of_one_key_never_overlap(lab: Lab, tmp_path: Path) -> None:
    inputs = {"folder": str(tmp_path / "busy")}
    started = [lab.start(ALONE, inputs) for _ in range(5)]
    assert [lab.wait(run_id).status for run_id in started] == ["succeeded"] * 5


def test_without_the_key_they_do(lab: Lab, tmp_path: Path) -> None:
    """The negative control."""
    text = "\n".join(line for line in ALONE.splitlines() if not line.startswith("concurrency"))
    started = [lab.start(text, {"folder": str(tmp_path / "busy")}) for _ in range(5)]
    assert "failed" in [lab.wait(run_id).status for run_id in started]


def test_a_waiting_run_says_what_it_waits_for(lab: Lab, sandbox: Sandbox) -> None:
    first = lab.start(SLOW)
    lab.until(first, "ask", "running")
    second = lab.start(SLOW)
    run = lab.services.run(second, steps=True)
    schemas.Run.model_validate(run)
    assert run["status"] == "queued"
    assert first in run["waits_for"]["what"]
    assert [step["status"] for step in run["steps"]] == ["ready"]
    told = lab.services.explain(second)
    schemas.Explanation.model_validate(told)
    assert told["waits_for"]["held_by"][0]["run_id"] == first
    assert told["waiting_for"] == {"key": 1}
    assert "waits_for" not in lab.services.run(first)
    assert lab.services.cancel(second)["status"] == "cancelled"  # at once: nothing of it has begun
    lab.services.cancel(first)
    assert lab.wait(first).status == "cancelled"


def test_a_newer_run_takes_the_place_of_the_older(lab: Lab, sandbox: Sandbox) -> None:
    newer = other(SLOW, "cancel_running")
    first = lab.start(SLOW)
    lab.until(first, "ask", "running")
    second = lab.start(newer)
    third = lab.start(newer, {"text": "go"})
    assert lab.wait(third).status == "succeeded"
    assert [lab.services.run(run_id)["status"] for run_id in (first, second)] == ["cancelled"] * 2
    assert lab.services.run(first)["finished_at"] <= lab.services.run(third)["started_at"]


def test_a_failed_run_gives_its_key_back_and_its_resume_takes_it_again(lab: Lab, sandbox: Sandbox) -> None:
    sandbox.faults({"status": 400, "times": 1})
    first = lab.run(SLOW, {"text": "go"})
    assert first.status == "failed"
    holder = lab.start(SLOW)
    lab.until(holder, "ask", "running")
    again = lab.services.resume(first.id, home=lab.home).run_id
    assert holder in lab.services.run(again)["waits_for"]["what"]
    lab.services.cancel(holder)
    assert lab.wait(again).status == "succeeded"


def test_a_key_that_cannot_be_made_starts_nothing(lab: Lab) -> None:
    before = lab.services.runs(limit=1)["items"]
    with pytest.raises(InputInvalid, match="was not given"):
        lab.start(ALONE)
    assert lab.services.runs(limit=1)["items"] == before


# The steps of one run


def crowd(folder: Path, most: int) -> str:
    """Six steps beside each other, a map with room of its own and its reduce: each needs the folder for itself."""
    alone = f"""run: [sh, -c, 'mkdir "$D" && sleep 0.1 && rmdir "$D"'], env: {{D: "{folder}"}}"""
    steps = "\n".join(f"  - {{id: s{number}, {alone}}}" for number in range(6))
    return f"""
name: crowd
limits: {{max_parallel: {most}}}
steps:
{steps}
  - id: each
    map: {{over: "{{{{[1, 2, 3, 4, 5]}}}}", as: item, max_parallel: 5, reduce: {{{alone}}}}}
    {alone.replace(", env", chr(10) + "    env")}
  - {{id: last, {alone}, when: "s0.exit_code == 0"}}
"""


def test_max_parallel_holds_for_the_whole_run(lab: Lab, tmp_path: Path) -> None:
    ran = lab.run(crowd(tmp_path / "busy", 1))
    assert ran.status == "succeeded", ran.document["error"]
    assert lab.run(crowd(tmp_path / "other", 9)).status == "failed"  # the negative control


def test_max_parallel_holds_across_workers(
    postgres_admin: str, redis_server_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    with (
        fresh_database(postgres_admin) as database,
        cluster(database, redis_server_url, sandbox, tmp_path) as fleet,
    ):
        for _ in range(2):
            fleet.worker(wait=False)
        for process in fleet.processes:
            process.wait_ready()
        ran = fleet.run(crowd(tmp_path / "busy", 1))
        assert ran.status == "succeeded", ran.document["error"]
        assert fleet.run(crowd(tmp_path / "other", 9)).status == "failed"  # the negative control


# Through the API


def test_a_refused_run_is_409_and_names_the_holder(sandbox: Sandbox, tmp_path: Path) -> None:
    with laboratory(tmp_path, sandbox) as lab:
        app = create_app(lab.services, SingleKey("gk"))
        with (
            TestClient(app, headers={"X-API-Key": "gk"}) as http,
            Client("http://testserver", api_key="gk", transport=http._transport) as client,
        ):
            holder = client.submit(source=SLOW, inputs={})["run_id"]
            reject = other(SLOW, "reject")
            answer = http.post("/v1/runs", json={"source": reject})
            assert answer.status_code == 409
            assert answer.headers["content-type"] == "application/problem+json"
            body = answer.json()
            schemas.ErrorBody.model_validate(body)
            assert (body["type"], body["key"], body["held_by"]) == ("urn:gorgon:error:conflict", "one", [holder])
            with pytest.raises(Conflict, match=holder):
                client.submit(source=reject, inputs={})
            waiting = client.submit(source=SLOW, inputs={}, idempotency_key="k")
            assert client.submit(source=SLOW, inputs={}, idempotency_key="k")["run_id"] == waiting["run_id"]
            assert client.run(waiting["run_id"])["waits_for"]["held_by"][0]["run_id"] == holder
            assert client.explain(waiting["run_id"])["waits_for"]["ahead"] == 0
            assert client.cancel(waiting["run_id"])["status"] == "cancelled"


# On the command line


def environment(sandbox: Sandbox, folder: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("GORGON_")}
    return {**kept, "GORGON_ENV_FILE": "", "GORGON_HOME": str(folder), "GORGON_SANDBOX_URL": sandbox.url}


def gorgon(*arguments: str, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GORGON, *arguments],
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_after_a_kill_the_next_run_starts_and_the_dead_one_can_be_resumed(sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "slow.yaml"
    path.write_text(SLOW)
    env = environment(sandbox, tmp_path / "home")
    first = subprocess.Popen(
        [*GORGON, "run", str(path)],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert first.stdout is not None
    run_id = ""
    for line in first.stdout:
        run_id = run_id or line.split()[0]
        if "ask  running" in line:
            break
    refused = tmp_path / "reject.yaml"
    refused.write_text(other(SLOW, "reject"))
    done = gorgon("run", str(refused), env=env)
    assert done.returncode == 2
    assert run_id in done.stderr
    assert f"gorgon runs cancel {run_id}" in done.stderr
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = gorgon("run", str(path), "-i", "text=go", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"held by {run_id}" in done.stderr
    dead = json.loads(gorgon("runs", "show", run_id, "--json", env=env).stdout)
    assert (dead["status"], dead["error"]["kind"]) == ("failed", "orphaned")
    sandbox.clear_faults()
    again = subprocess.Popen(
        [*GORGON, "runs", "resume", run_id], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
    )
    assert again.stdout is not None
    assert any("ask  running" in line for line in again.stdout)
    again.send_signal(signal.SIGINT)
    again.communicate(timeout=20)
    assert again.returncode == 130
    show = gorgon("run", str(refused), "-i", "text=go", env=env)
    assert show.returncode == 0, show.stderr


# On a cluster


def held_from_to(lab: Lab, ids: list[str]) -> list[tuple[datetime, datetime]]:
    with lab.services.database.read() as connection:
        rows = connection.execute(
            select(runs.c.key_at, runs.c.finished_at).where(runs.c.public_id.in_(ids)).order_by(runs.c.key_at)
        ).all()
    return [(row.key_at, row.finished_at) for row in rows]


@pytest.mark.slow
def test_workers_that_are_killed_break_no_key_and_forget_no_run(
    postgres_admin: str, redis_server_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Ten runs of one key on three workers, one of which is killed again and again: also whoever ends a run."""
    text = SLOW.replace("delay=30s", "delay=300ms")
    with (
        fresh_database(postgres_admin) as database,
        cluster(database, redis_server_url, sandbox, tmp_path, lease=2.0) as fleet,
    ):
        for _ in range(3):
            fleet.worker("anthropic", wait=False)
        for process in fleet.processes:
            process.wait_ready()
        ids = [fleet.start(text) for _ in range(10)]

        def ended() -> int:
            return sum(fleet.services.run(run_id)["finished_at"] is not None for run_id in ids)

        for turn in range(3):
            eventually(lambda turn=turn: ended() > 2 * turn, within=40, what="an end")
            fleet.processes.pop(0).kill()
            fleet.worker("anthropic", wait=False)
        found: list[dict[str, Any]] = [fleet.wait(run_id, within=60).document for run_id in ids]
        held = held_from_to(fleet, ids)
    assert [run["status"] for run in found] == ["succeeded"] * 10
    assert len(held) == 10
    assert all(before[1] <= after[0] for before, after in pairwise(held))
    assert [run["run_id"] for run in sorted(found, key=lambda run: str(run["started_at"]))] == ids, "in their order"
