"""The same files on Redis and PostgreSQL, with a worker process for each queue, and through the API."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gorgon_common.client.http import Client
from gorgon_common.workflow import catalogue
from tests.support.processes import GORGON, Cluster, Process, cluster
from tests.support.running import FINISHED, Lab, Ran, eventually, laboratory
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.servers import fresh_database

__all__ = ["sandbox", "sandbox_process"]

KEY = "gk_of_these_tests"

MAP_REDUCE = """
name: map and reduce
inputs: {words: {type: array, items: {type: string}, default: [alpha, beta, gamma, delta, epsilon, zeta, eta]}}
steps:
  - id: each
    map:
      over: "{{inputs.words}}"
      as: word
      max_parallel: 3
      on_item_failure: continue
      min_success: 50%
      reduce: {role: reporter, provider: openai, prompt: "Sum up {{results}}"}
    provider: anthropic
    prompt: "Write about {{word}}"
outputs: {report: "{{each.output}}"}
"""
LOOP = """
name: a loop
steps:
  - id: work
    loop: {until: "check.score > 90", max: 3}
    steps:
      - {id: draft, role: documenter, prompt: "Draft, last score {{default(work.output.check.score, 0)}}"}
      - {id: check, role: reviewer, prompt: "Review {{draft.content}}"}
  - {id: end, prompt: "Finish {{work.output.draft.content}}"}
outputs: {score: "{{work.output.check.score}}", end: "{{end.output}}"}
"""
QUEUES = """
name: across queues
inputs: {go: {type: boolean, default: false}}
steps:
  - {id: plan, role: planner, provider: anthropic, prompt: Plan a counter}
  - {id: list, run: [sh, -c, 'printf "%s\\n" "$TITLE" two three'], env: {TITLE: "{{plan.tasks[0].title}}"}}
  - {id: build, role: builder, provider: openai, prompt: "Build {{list.output}}"}
  - {id: off, prompt: never, when: inputs.go}
  - {id: after_off, prompt: "{{off.output}}"}
  - {id: left, provider: openai, prompt: "L {{build.summary}}"}
  - {id: right, provider: anthropic, prompt: "R {{build.summary}}"}
  - {id: bad, run: [sh, -c, "exit 3"], allow_failure: true}
  - {id: broken, run: ["false"], on_failure: continue_with_default, default_output: instead}
  - id: pair
    steps:
      - {id: one, provider: openai, prompt: "one {{left.output}}"}
      - {id: two, run: [cat], stdin: "{{one.output}}"}
  - id: end
    role: reviewer
    prompt: "{{right.output}} {{pair.output.two}} {{broken.output}} {{default(after_off.output, 'none')}}"
    depends_on: after_off
    join: none_failed
    when: bad.exit_code == 3
finally: [{id: tidy, run: [echo, "{{end.status}}"]}]
outputs: {review: "{{default(end.summary, 'none')}}", code: "{{bad.exit_code}}", list: "{{list.output}}"}
"""
OLDER = """
name: An older file
version: 1.0
inputs:
  topic: {type: string, default: tea}
  files: {type: list, default: [a.py, b.py, c.py]}
  focus: {type: string, default: style}
outputs: [plan, report, summary]
steps:
  - id: make-plan
    type: claude_code
    params: {role: planner, prompt: "Plan ${topic}"}
    outputs: [plan, tasks]
  - id: list
    type: shell
    params: {command: 'for f in ${files}; do echo "$f"; done; echo "${topic}"'}
    outputs: [listing]
  - id: both
    type: parallel
    params:
      steps:
        - {id: style, type: openai, params: {role: reviewer, prompt: "Style of ${listing}"}, outputs: [style_notes]}
        - id: security
          type: claude_code
          params: {role: security_auditor, prompt: "Security of ${listing}"}
          condition: {field: focus, operator: equals, value: security}
          outputs: [security_notes]
  - id: each
    type: fan_out
    params:
      items: ${files}
      max_concurrent: 2
      step_template: {type: openai, params: {role: reviewer, prompt: "Review ${item}"}}
    outputs: [reviews]
  - id: report
    type: map_reduce
    params:
      items: ${files}
      map_step: {type: openai, params: {role: analyst, prompt: "Look at ${item}"}}
      reduce_step: {type: claude_code, params: {role: reporter, prompt: "Join ${map_results}"}}
    outputs: [report]
  - id: sum
    type: claude_code
    params: {role: documenter, prompt: "Sum up ${style_notes} ${security_notes} ${reviews}"}
    outputs: [summary]
"""
FILES = {"map-reduce": MAP_REDUCE, "loop": LOOP, "queues": QUEUES, "older": OLDER}


def text_of(name: str) -> str:
    return FILES.get(name) or catalogue.source(name)


@pytest.fixture(scope="module")
def distributed(
    postgres_admin: str, redis_server_url: str, sandbox_process: Sandbox, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Cluster]:
    """PostgreSQL and Redis with a worker process for each queue; none serves two of the three."""
    folder = tmp_path_factory.mktemp("cluster")
    with (
        fresh_database(postgres_admin) as database,
        cluster(database, redis_server_url, sandbox_process, folder) as made,
    ):
        for queue in ("openai", "anthropic", "command", "control"):
            made.worker(queue, wait=False)
        for process in made.processes:
            process.wait_ready()
        yield made


@pytest.fixture(scope="module")
def here(sandbox_process: Sandbox, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(tmp_path_factory.mktemp("lab"), sandbox_process) as lab:
        yield lab


@pytest.fixture(scope="module")
def url(distributed: Cluster) -> Iterator[str]:
    environment = {**distributed.environment, "GORGON_API_KEY": KEY}
    process = Process("api", "--port", "0", ready="Gorgon API at", environment=environment)
    process.wait_ready()
    found = re.search(r"http://\S+", process.line)
    assert found is not None
    yield found[0]
    process.terminate()


def told(ran: Ran) -> dict[str, Any]:
    """Return everything of a run that must not depend on where it ran."""
    same = (
        "id",
        "item",
        "kind",
        "role",
        "provider",
        "model",
        "status",
        "reason",
        "output",
        "error",
        "tokens",
        "parent",
    )
    return {
        "status": ran.status,
        "outputs": ran.document["outputs"],
        "error": ran.document["error"],
        "tokens": ran.document["tokens"],
        "cost": ran.document["cost_usd"],
        "steps": [{name: step[name] for name in same} for step in ran.document["steps"]],
    }


@pytest.mark.parametrize("name", ["feature-build", "analytics-pipeline", *FILES])
def test_the_same_file_gives_the_same_result_on_both_tiers(
    name: str, here: Lab, distributed: Cluster, sandbox: Sandbox
) -> None:
    one = here.run(text_of(name))
    assert one.status == "succeeded", one.document["error"]
    assert one.outputs
    calls = sandbox.count(by="role,provider,digest")
    sandbox.clear_log()
    two = distributed.run(text_of(name))
    assert told(two) == told(one)
    order = str
    assert sorted(sandbox.count(by="role,provider,digest"), key=order) == sorted(calls, key=order), "the same calls"


def test_a_queue_whose_worker_stands_still_holds_nobody_else_up(distributed: Cluster, sandbox: Sandbox) -> None:
    """With the worker of one queue frozen, the steps of the other queues end, and its own wait for it."""
    openai = distributed.processes[0]
    text = """
name: bulkheads
steps:
  - {id: one, provider: openai, prompt: one}
  - {id: two, provider: anthropic, prompt: two}
  - {id: three, run: [echo, three]}
  - {id: four, provider: anthropic, prompt: "{{two.output}} {{three.output}}"}
"""
    openai.send(signal.SIGSTOP)
    try:
        run_id = distributed.start(text)
        distributed.until(run_id, "four", "succeeded")
        assert Ran(distributed.services.run(run_id, steps=True)).states()["one"] == "ready"
    finally:
        openai.send(signal.SIGCONT)
    assert distributed.wait(run_id).status == "succeeded"
    assert sandbox.count(by="provider") == [
        {"provider": "anthropic", "count": 2},
        {"provider": "openai", "count": 1},
    ]


def gorgon(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GORGON, *arguments],
        env={**os.environ, "GORGON_API_KEY": KEY, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_gorgon_run_on_a_server(url: str, here: Lab, sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "queues.yaml"
    path.write_text(QUEUES)
    done = gorgon("run", str(path), "--server", url, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert told(Ran(json.loads(done.stdout))) == told(here.run(QUEUES))


def test_an_idempotency_key_gives_one_run_however_many_ask_at_once(
    url: str, distributed: Cluster, sandbox: Sandbox
) -> None:
    """Twelve clients send the same request with the same key at the same moment, four times over."""
    for turn in range(4):
        gate = threading.Barrier(12)
        answers: list[dict[str, Any]] = []

        def ask(key: str, gate: threading.Barrier = gate, answers: list[dict[str, Any]] = answers) -> None:
            with Client(url, api_key=KEY) as client:
                gate.wait(10)
                answers.append(
                    client.submit(
                        source='name: once\nsteps: [{id: it, prompt: "Once"}]\n', inputs={}, idempotency_key=key
                    )
                )

        sandbox.clear_log()
        threads = [threading.Thread(target=ask, args=(f"key-{turn}",)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert len(answers) == 12
        (run_id,) = {answer["run_id"] for answer in answers}
        assert sum(answer["created"] for answer in answers) == 1
        assert distributed.wait(run_id).status == "succeeded"
        assert len(sandbox.log()) == 1


@pytest.mark.parametrize("provider", ["openai", "anthropic", "command"])
def test_a_cancel_over_http_aborts_what_is_in_flight(
    provider: str, url: str, distributed: Cluster, sandbox: Sandbox
) -> None:
    action = (
        'run: [sleep, "30"]'
        if provider == "command"
        else f'provider: {provider}, timeout: 60s, prompt: "[[sandbox: delay=30s]] go"'
    )
    text = f"name: cancel\nsteps:\n  - {{id: slow, {action}}}\n  - {{id: next, prompt: '{{{{slow.output}}}}'}}\n"
    with Client(url, api_key=KEY) as client:
        run_id = client.submit(source=text, inputs={})["run_id"]
        distributed.until(run_id, "slow", "running")
        begun = time.monotonic()
        client.cancel(run_id)
        eventually(lambda: client.run(run_id)["status"] in FINISHED, within=5)
        took = time.monotonic() - begun
        ran = Ran(client.run(run_id, steps=True))
    assert ran.status == "cancelled"
    assert took < 2.0, f"{took:.2f} s"
    assert ran.states() == {"slow": "cancelled", "next": "cancelled"}


def test_a_cancel_of_a_finished_run_is_a_conflict(url: str, distributed: Cluster, sandbox: Sandbox) -> None:
    ran = distributed.run('name: done\nsteps: [{id: it, prompt: "x"}]\n')
    done = gorgon("runs", "cancel", ran.id, "--server", url)
    assert done.returncode == 2
    assert "already succeeded" in done.stderr


def test_a_large_output_crosses_queues_by_reference(distributed: Cluster, sandbox: Sandbox) -> None:
    ran = distributed.run(
        """
name: large
steps:
  - {id: big, provider: openai, prompt: "[[sandbox: huge=300kB]] go"}
  - {id: length, run: [wc, -c], stdin: "{{big.output}}"}
outputs: {size: "{{length.output}}"}
"""
    )
    assert int(ran.outputs["size"]) >= 300_000
