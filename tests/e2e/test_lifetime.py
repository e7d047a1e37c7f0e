"""How worker processes end: rolling restarts, grace periods, a second signal; and connections that say nothing."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Cluster, Process, cluster
from tests.support.proxy import proxied
from tests.support.running import eventually
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.servers import fresh_database

__all__ = ["sandbox", "sandbox_process"]

LIMITED = """
name: limited
limits: {max_parallel: 3}
inputs: {run: {type: integer, required: true}}
steps:
  - id: each
    map: {over: "{{[1, 2, 3, 4, 5, 6, 7, 8]}}", as: n}
    provider: openai
    prompt: "[[sandbox: delay=400ms]] Item {{n}} of {{inputs.run}}"
  - {id: one, provider: anthropic, prompt: "[[sandbox: delay=400ms]] One of {{inputs.run}}"}
  - {id: two, prompt: "[[sandbox: delay=400ms]] Two of {{inputs.run}} {{one.status}}"}
  - {id: end, prompt: "End of {{inputs.run}} {{two.status}} {{each.status}}"}
"""
LONG = 'name: long\nsteps: [{id: it, prompt: "[[sandbox: delay=20s]] Long", timeout: 60s}]\n'


@pytest.fixture
def fleet(postgres_admin: str, redis_server_url: str, sandbox: Sandbox, tmp_path: Path) -> Iterator[Cluster]:
    with (
        fresh_database(postgres_admin) as database,
        cluster(database, redis_server_url, sandbox, tmp_path) as made,
    ):
        yield made


def holds(fleet: Cluster, process: Process) -> int:
    """Return how many steps a worker is running."""
    with fleet.services.database.read() as connection:
        return int(
            connection.exec_driver_sql(
                "SELECT count(*) FROM steps JOIN workers ON workers.id = steps.owner"
                f" WHERE steps.status = 2 AND workers.name LIKE '%%:{process.pid}'"
            ).scalar_one()
        )


def test_workers_that_are_replaced_one_after_the_other_make_no_call_twice(fleet: Cluster, sandbox: Sandbox) -> None:
    """Most steps of runs with `max_parallel` come in without a message that would wait for them."""
    for _ in range(2):
        fleet.worker(slots=4, wait=False)
    runs = [fleet.start(LIMITED, {"run": number}) for number in range(4)]
    codes = []
    for _ in range(4):
        old = fleet.processes.pop(0)
        old.wait_ready()
        eventually(lambda old=old: holds(fleet, old) > 1, within=60, what="a worker that holds steps")
        old.send(signal.SIGTERM)
        fleet.worker(slots=4, wait=False)
        codes.append(old.wait(60))
    ended = [fleet.wait(run, within=120) for run in runs]
    assert {ran.status for ran in ended} == {"succeeded"}
    assert codes == [0] * 4
    calls = Counter(entry["prompt"] for entry in sandbox.log())
    assert len(calls) == 4 * 11
    assert set(calls.values()) == {1}, "a call was made twice"
    assert "step.recovered" not in {event["kind"] for ran in ended for event in ran.events}


def test_what_has_not_ended_within_the_grace_period_is_given_back(fleet: Cluster, sandbox: Sandbox) -> None:
    """Another worker has it at once, not when the lease has run out, and the step is blamed for nothing."""
    fleet.environment["GORGON_GRACE_SECONDS"] = "1s"
    old = fleet.worker()
    run_id = fleet.start(LONG)
    eventually(lambda: holds(fleet, old) == 1, within=60)
    sandbox.faults({"contains": "Long", "text": "quick"})
    fleet.worker()
    old.send(signal.SIGTERM)
    assert old.wait(20) == 1
    ran = fleet.wait(run_id)
    assert ran.status == "succeeded"
    assert len(sandbox.log(status=200)) <= 2
    with fleet.services.database.read() as connection:
        assert connection.exec_driver_sql("SELECT max(crashes) FROM steps").scalar_one() == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_worker_at_once(
    number: signal.Signals, code: int, fleet: Cluster, sandbox: Sandbox
) -> None:
    worker = fleet.worker()
    run_id = fleet.start(LONG)
    eventually(lambda: holds(fleet, worker) == 1, within=60)
    # The run is marked as running by a transaction that follows the claim.
    eventually(lambda: fleet.services.run(run_id)["status"] == "running", what="the start of the run")
    worker.send(signal.SIGTERM)
    eventually(lambda: any("told to stop" in line for line in worker.said), what="the stop")
    assert worker.alive
    begun = time.monotonic()
    worker.send(number)
    assert worker.wait(20) == code
    assert time.monotonic() - begun < 15, "it waited for the call"
    assert fleet.services.run(run_id)["status"] == "running"


STEPS = """
name: steps
steps:
  - {id: one, prompt: "[[sandbox: delay=300ms]] One of {{inputs.run}}"}
  - {id: two, prompt: "[[sandbox: delay=300ms]] Two of {{inputs.run}} {{one.status}}"}
  - {id: end, prompt: "End of {{inputs.run}} {{two.status}}"}
inputs: {run: {type: integer, required: true}}
"""


def test_connections_that_say_nothing_are_given_up(
    postgres_admin: str, redis_server_url: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    """Every connection of a worker to PostgreSQL and Redis goes silent; new ones work."""
    with (
        fresh_database(postgres_admin) as database,
        proxied(database) as (postgres, database_url),
        proxied(redis_server_url) as (redis, redis_url),
        cluster(database, redis_server_url, sandbox, tmp_path) as fleet,
    ):
        fleet.environment |= {"GORGON_DATABASE_URL": database_url, "GORGON_REDIS_URL": redis_url}
        worker = fleet.worker()
        runs = [fleet.start(STEPS, {"run": 1})]
        eventually(lambda: sandbox.log(), within=60, what="the first call")
        assert postgres.silence() > 1
        assert redis.silence() > 1
        begun = time.monotonic()
        runs.append(fleet.start(STEPS, {"run": 2}))
        assert {fleet.wait(run, within=75).status for run in runs} == {"succeeded"}
        print(f"\nfrom the silence to the end of both runs: {time.monotonic() - begun:.1f} s")
        assert set(Counter(entry["prompt"] for entry in sandbox.log()).values()) == {1}, "a call was made twice"
        postgres.silence()
        redis.silence()
        begun = time.monotonic()
        worker.send(signal.SIGTERM)
        assert worker.wait(30) == 0
        print(f"SIGTERM while nothing answers: {time.monotonic() - begun:.1f} s")
