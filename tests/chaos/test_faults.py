"""What kills, freezes, empties and restarts does to runs under way: nothing is lost, nothing is recorded twice.

Real processes, PostgreSQL and Redis of this module's own, leases of two seconds.  The figures of docs/reliability.md:

    pytest tests/chaos -s
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
from sqlalchemy import select

from gorgon_common.canvas.celery import queue_name
from gorgon_common.engine.records import step_id
from gorgon_common.persistence.tables import checkpoints, ledger, steps
from tests.support.processes import GORGON, Cluster, RedisProcess, cluster
from tests.support.running import Ran, eventually
from tests.support.sandbox import Sandbox, sandbox, sandbox_process
from tests.support.servers import crashing_postgres, fresh_database

__all__ = ["sandbox", "sandbox_process"]

pytestmark = [pytest.mark.chaos, pytest.mark.slow]

LEASE = 2.0


@pytest.fixture(scope="module")
def redis_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisProcess]:
    process = RedisProcess(tmp_path_factory.mktemp("redis"))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def postgres_process() -> Iterator[tuple[str, Callable[[], float]]]:
    """A PostgreSQL with fsync, and what crashes it and starts it again."""
    with crashing_postgres() as made:
        yield made


@pytest.fixture(scope="module")
def together(
    postgres_process: tuple[str, Callable[[], float]],
    redis_process: RedisProcess,
    sandbox_process: Sandbox,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("chaos")
    with (
        fresh_database(postgres_process[0]) as database,
        cluster(database, redis_process.url, sandbox_process, folder, lease=LEASE) as made,
    ):
        yield made


@pytest.fixture
def fleet(together: Cluster, sandbox: Sandbox) -> Cluster:
    """The cluster with two living workers of all queues."""
    together.processes = [process for process in together.processes if process.alive]
    for _ in range(2 - len(together.processes)):
        together.worker(wait=False)
    for process in together.processes:
        process.wait_ready()
    return together


def figure(what: str, seconds: float) -> None:
    """Print a line for docs/reliability.md."""
    print(f"\n{what}: {seconds:.1f} s")


def recorded(fleet: Cluster, run_id: str) -> Counter[int]:
    """Return how often a result is recorded for each finished step of a run: in checkpoints and in the journal."""
    number = fleet.services.number(run_id)
    with fleet.services.database.read() as connection:
        of_run = connection.execute(
            select(checkpoints.c.step_id).where(
                checkpoints.c.step_id.between(step_id(number, 0), step_id(number + 1, 0))
            )
        )
        return Counter(row.step_id for row in of_run)


def once(fleet: Cluster, ran: Ran) -> None:
    """Assert that every step of a run has exactly one end: one checkpoint, one event."""
    assert set(recorded(fleet, ran.id).values()) == {1}
    ends = Counter(
        event["step"]
        for event in ran.events
        if event["kind"] in ("step.succeeded", "step.failed", "step.skipped", "step.cancelled")
    )
    assert set(ends.values()) == {1}, ends
    assert Counter(event["kind"] for event in ran.events)["run.succeeded"] <= 1


def prompts(sandbox: Sandbox, **fields: Any) -> Counter[str]:
    return Counter(entry["prompt"] for entry in sandbox.log(**fields))


MIXED = """
name: mixed
inputs: {n: {type: array, items: {type: integer}, required: true}}
steps:
  - {id: first, prompt: "First"}
  - id: each
    depends_on: first
    map: {over: "{{inputs.n}}", as: n, max_parallel: 6, reduce: {role: reporter, prompt: "Join {{results}}"}}
    provider: openai
    prompt: "[[sandbox: delay=300ms]] Item {{n}}"
  - {id: left, depends_on: first, prompt: "[[sandbox: delay=300ms]] Left"}
  - {id: left2, prompt: "[[sandbox: delay=300ms]] Left2 {{left.status}}"}
  - {id: left3, prompt: "[[sandbox: delay=300ms]] Left3 {{left2.status}}"}
  - {id: right, depends_on: first, run: [sh, -c, "sleep 0.3; echo right"]}
  - {id: last, role: reviewer, prompt: "Last {{left3.status}} {{right.output}} {{each.status}}"}
outputs: {items: "{{each.output}}", right: "{{right.output}}"}
"""
INPUTS = {"n": list(range(24))}


def holder(fleet: Cluster) -> Any:
    """Return the worker process that holds the most running steps, once there is one that holds any."""

    def look() -> Any:
        with fleet.services.database.read() as connection:
            owners = Counter(
                connection.scalars(select(steps.c.owner).where(steps.c.status == 2, steps.c.owner.is_not(None)))
            )
            names = {row.id: row.name for row in connection.exec_driver_sql("SELECT id, name FROM workers").all()}
        for owner, _ in owners.most_common():
            pid = int(names[owner].rpartition(":")[2])
            for process in fleet.processes:
                if process.pid == pid and process.alive:
                    return process
        return None

    return eventually(look, what="a worker that holds a step")


class TestWorkers:
    def test_kill_9_in_mid_run(self, fleet: Cluster, sandbox: Sandbox) -> None:
        run_id = fleet.start(MIXED, INPUTS)
        eventually(lambda: len(sandbox.log(status=200)) > 6, what="the middle of the run")
        victim = holder(fleet)
        killed = time.time()
        victim.kill()
        ran = fleet.wait(run_id)
        assert ran.status == "succeeded", ran.document["error"]
        once(fleet, ran)
        lost = [event for event in ran.events if event["kind"] == "step.recovered"]
        assert lost, "it held something"
        from_database = max(event["at"] for event in lost)
        figure("kill -9, until what it held was taken over", datetime.fromisoformat(from_database).timestamp() - killed)
        figure("kill -9, until the run had ended", time.time() - killed)
        calls = prompts(sandbox, status=200)
        again = {prompt: count for prompt, count in calls.items() if count > 1}
        names = {event["step"] for event in lost}
        assert len(again) <= len(names), "only what the dead worker held was asked again"
        assert max(calls.values()) <= 2
        assert len(ran.items("each")) == 24

    def test_a_frozen_worker_wakes_up_and_its_late_result_is_refused(self, fleet: Cluster, sandbox: Sandbox) -> None:
        """SIGSTOP for longer than the lease: somebody else does the step; what the frozen one brings is too late."""
        sandbox.faults(
            {"contains": "Answer", "delay": "1s", "text": "stale", "times": 1},
            {"contains": "Answer", "text": "fresh", "after": 1},
        )
        run_id = fleet.start('name: frozen\nsteps: [{id: it, prompt: Answer}]\noutputs: {it: "{{it.output}}"}\n')
        eventually(lambda: sandbox.ask("GET", "/_faults")["faults"][0]["fired"], what="the first call")
        victim = holder(fleet)
        victim.send(signal.SIGSTOP)
        frozen = time.time()
        try:
            ran = fleet.wait(run_id)
            figure("SIGSTOP, until the run had ended elsewhere", time.time() - frozen)
            assert ran.outputs["it"] == "fresh"
        finally:
            victim.send(signal.SIGCONT)
        number = fleet.services.number(run_id)

        def facts() -> list[Any]:
            with fleet.services.database.read() as connection:
                return list(connection.execute(select(ledger).where(ledger.c.step_id == step_id(number, 0))))

        late = eventually(lambda: found if len(found := facts()) == 2 else None, what="the stale finish")
        assert len({row.token for row in late}) == 2, "both calls were paid, and are in the ledger"
        after = fleet.services.run(run_id, steps=True)
        assert after["outputs"] == {"it": "fresh"}
        assert after["steps"][0]["output"] == "fresh"
        once(fleet, ran)
        eventually(lambda: fleet.run("name: x\nsteps: [{id: it, prompt: x}]\n").status == "succeeded")

    def test_a_warm_stop_loses_nothing_and_takes_seconds(self, fleet: Cluster, sandbox: Sandbox) -> None:
        run_id = fleet.start(MIXED, INPUTS)
        eventually(lambda: len(sandbox.log(status=200)) > 6, what="the middle of the run")
        victim = holder(fleet)
        took = victim.terminate()
        figure("SIGTERM in mid-run, until the worker had ended", took)
        assert took < 10
        assert victim._process.returncode == 0
        ran = fleet.wait(run_id)
        assert ran.status == "succeeded", ran.document["error"]
        once(fleet, ran)
        assert "step.recovered" not in {event["kind"] for event in ran.events}
        assert set(prompts(sandbox).values()) == {1}, "nothing was asked twice"

    def test_a_step_that_kills_its_workers_is_poison_and_takes_no_innocents_with_it(
        self, fleet: Cluster, sandbox: Sandbox, tmp_path: Path
    ) -> None:
        """Its command kills the worker: the process above the one that watches over it."""
        run_id = fleet.start(
            f"""
name: poison
steps:
  - id: poison
    on_failure: skip
    run: [sh, -c, 'echo x >> {tmp_path}/deaths; kill -9 $(cut -d" " -f4 /proc/$PPID/stat); sleep 5']
  - id: innocent
    map: {{over: "{{{{[1,2,3,4]}}}}", as: n}}
    run: [sh, -c, 'sleep 0.5; echo "$1"', sh, "{{{{n}}}}"]
  - {{id: after, run: [echo, after], depends_on: innocent}}
"""
        )
        begun = time.time()
        ended = lambda: fleet.services.run(run_id)["finished_at"]  # noqa: E731
        deaths: list[int] = []
        while not ended():
            assert time.time() - begun < 25
            for process in list(fleet.processes):
                if not process.alive:
                    deaths.append(process.pid)
                    fleet.processes.remove(process)
                    fleet.worker(wait=False)
            time.sleep(0.02)
        figure("poison, until it was condemned", time.time() - begun)
        ran = fleet.wait(run_id)
        assert ran.status == "succeeded", ran.document["error"]
        poison = ran.step("poison")
        assert poison["error"]["kind"] == "poison"
        assert "3 times" in poison["error"]["message"]
        assert (tmp_path / "deaths").read_text() == "x\n" * 3
        assert ran.output("innocent") == ["1\n", "2\n", "3\n", "4\n"]
        assert ran.output("after") == "after\n"
        once(fleet, ran)


class TestRedis:
    def test_flushall_in_mid_run(self, fleet: Cluster, redis_process: RedisProcess, sandbox: Sandbox) -> None:
        run_id = fleet.start(MIXED, INPUTS)
        eventually(lambda: len(sandbox.log(status=200)) > 6, what="the middle of the run")
        with redis_process.client() as client:
            client.flushall()
        flushed = time.time()
        ran = fleet.wait(run_id)
        figure("FLUSHALL, until the run had ended", time.time() - flushed)
        assert ran.status == "succeeded", ran.document["error"]
        once(fleet, ran)
        assert set(prompts(sandbox).values()) == {1}, "nothing was asked twice"

    def test_messages_that_are_lost_before_anybody_saw_them(
        self, fleet: Cluster, redis_process: RedisProcess, sandbox: Sandbox
    ) -> None:
        """Both workers are frozen, so the messages lie in Redis when it is emptied."""
        for process in fleet.processes:
            process.send(signal.SIGSTOP)
        runs = [fleet.start(f'name: lost\nsteps: [{{id: it, prompt: "Lost {n}"}}]\n') for n in range(5)]
        with redis_process.client() as client:
            client.flushall()
        flushed = time.time()
        for process in fleet.processes:
            process.send(signal.SIGCONT)
        for run_id in runs:
            assert fleet.wait(run_id).status == "succeeded"
        figure("FLUSHALL with everything in Redis, until all had ended", time.time() - flushed)
        assert set(prompts(sandbox).values()) == {1}

    def test_redis_is_away_and_comes_back_empty(
        self, fleet: Cluster, redis_process: RedisProcess, sandbox: Sandbox
    ) -> None:
        """Also a run that was submitted while there was no broker: its row is enough."""
        run_id = fleet.start(MIXED, INPUTS)
        eventually(lambda: len(sandbox.log(status=200)) > 6, what="the middle of the run")
        redis_process.stop()
        meanwhile = fleet.start('name: meanwhile\nsteps: [{id: it, prompt: "Meanwhile"}]\n')
        redis_process.start()
        back = time.time()
        ran, other = fleet.wait(run_id), fleet.wait(meanwhile)
        figure("Redis killed and started empty, until both runs had ended", time.time() - back)
        assert ran.status == other.status == "succeeded"
        once(fleet, ran)
        assert set(prompts(sandbox).values()) == {1}

    def test_duplicates_garbage_and_forgeries_are_dropped(
        self, fleet: Cluster, redis_process: RedisProcess, sandbox: Sandbox
    ) -> None:
        done = fleet.run('name: done\nsteps: [{id: it, prompt: "Done"}]\n')
        run_id = fleet.start('name: busy\nsteps: [{id: it, prompt: "[[sandbox: delay=700ms]] Busy"}]\n')
        fleet.until(run_id, "it", "running")
        app, now, queue = fleet.services.app, time.time(), queue_name("anthropic", "sandbox")
        finished = step_id(fleet.services.number(done.id), 0)
        running = step_id(fleet.services.number(run_id), 0)
        for ids in ([finished], [running], [running] * 4, [finished, running], [1 << 60], [step_id(999_999, 3)]):
            for _ in range(3):
                app.send_task("gorgon.agent", args=(ids, now), queue=queue)
        forged: Sequence[Any] = [
            (), ([], now), (["1"], now), ([-1], now), ([True], now), ([running], "soon"), ("x", now), ({"a": 1}, now),
            (list(range(1, 2000)), now), ([running], now, "more"), ([1 << 70], now),
        ]  # fmt: skip
        with redis_process.client() as client:
            eventually(lambda: not client.llen(queue), what="somebody who listens to these")
        for arguments in forged:
            app.send_task("gorgon.agent", args=arguments, queue=queue)
        app.send_task("gorgon.agent", args=([running], now), kwargs={"run": "x"}, queue=queue)
        app.send_task("gorgon.nonsense", args=([running], now), queue=queue)
        app.send_task("os.system", args=("touch /tmp/forged",), queue=queue)
        with redis_process.client() as client:
            eventually(lambda: not client.llen(queue), what="somebody who listens to these")
        assert fleet.wait(run_id).status == "succeeded"
        assert fleet.run('name: after\nsteps: [{id: it, prompt: "After"}]\n').status == "succeeded"
        assert prompts(sandbox) == {"Done": 1, " Busy": 1, "After": 1}
        assert all(process.alive for process in fleet.processes)

    def test_junk_in_a_queue_stops_no_worker(
        self, fleet: Cluster, redis_process: RedisProcess, sandbox: Sandbox
    ) -> None:
        queue = queue_name("anthropic", "sandbox")
        where = {
            "delivery_tag": "1",
            "body_encoding": "base64",
            "delivery_info": {"exchange": "", "routing_key": queue},
        }
        message = {
            "body": "W10=",
            "headers": {"task": "gorgon.agent", "id": "1"},
            "content-type": "application/json",
            "content-encoding": "utf-8",
            "properties": where,
        }
        envelopes: list[dict[str, Any]] = [
            {},
            {"body": 1, "headers": {}, "properties": {}},
            {**message, "headers": None},
            {**message, "headers": {}},
            {**message, "headers": {"task": "gorgon.agent", "id": "1", "chord": 5, "chain": 7}},
            {**message, "headers": {"task": ["gorgon.agent"], "id": {}}},
            {**message, "body": "!!"},
            {**message, "body": "//79"},
            {**message, "body": "eyJhIjogMX0="},
            {**message, "content-type": "application/x-python-serialize", "content-encoding": "binary"},
            {**message, "content-encoding": "rot13"},
            {**message, "properties": {**where, "body_encoding": "gzip"}},
        ]
        junk = [b"no json", b"[1, 2]", b"null", b"7", b"\xff\xfe\x00", *(json.dumps(it).encode() for it in envelopes)]
        with redis_process.client() as client:
            for _ in range(2):
                client.lpush(queue, *junk)
            eventually(lambda: not client.llen(queue), what="the end of the junk")
        begun = time.time()
        assert fleet.run('name: after\nsteps: [{id: it, prompt: "After"}]\n').status == "succeeded"
        assert time.time() - begun < 4, "the workers serve their queues as before"
        assert all(process.alive for process in fleet.processes)
        assert prompts(sandbox) == {"After": 1}


class TestPostgres:
    def test_every_connection_is_cut_in_mid_run(
        self, fleet: Cluster, postgres_process: tuple[str, Callable[[], float]], sandbox: Sandbox
    ) -> None:
        name = fleet.services.database.engine.url.database
        run_id = fleet.start(MIXED, INPUTS)
        begun = time.time()
        with psycopg.connect(postgres_process[0], autocommit=True) as admin:
            for after in (3, 9, 15):
                eventually(lambda after=after: len(sandbox.log(status=200)) > after, what="more of the run")
                admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", [name])
        ran = fleet.wait(run_id)
        figure("every connection to PostgreSQL cut three times, whole run", time.time() - begun)
        assert ran.status == "succeeded", ran.document["error"]
        once(fleet, ran)
        assert set(prompts(sandbox).values()) == {1}, "results were held, not asked for again"

    def test_it_crashes_in_mid_run_and_comes_back(
        self, fleet: Cluster, postgres_process: tuple[str, Callable[[], float]], sandbox: Sandbox
    ) -> None:
        """The workers, and the one who looks on, hold what they have until it is there again."""
        run_id = fleet.start(MIXED, INPUTS)
        eventually(lambda: len(sandbox.log(status=200)) > 6, what="the middle of the run")
        down = postgres_process[1]()
        begun = time.time()
        ran = fleet.wait(run_id)
        figure(f"PostgreSQL crashed ({down:.1f} s away), until the run had ended", time.time() - begun)
        assert ran.status == "succeeded", ran.document["error"]
        once(fleet, ran)
        assert all(process.alive for process in fleet.processes)
        assert set(prompts(sandbox).values()) == {1}, "results were held, not asked for again"


class TestLaptop:
    def test_gorgon_run_is_killed_and_resumed(self, sandbox: Sandbox, tmp_path: Path) -> None:
        path = tmp_path / "mixed.yaml"
        path.write_text(MIXED)
        environment = {
            **os.environ,
            "GORGON_SANDBOX_URL": sandbox.url,
            "GORGON_HOME": str(tmp_path / "home"),
            "GORGON_COMMANDS_ALLOW": "*",
        }
        process = subprocess.Popen(
            [*GORGON, "run", str(path), "-i", f"n={json.dumps(INPUTS['n'])}"],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        eventually(lambda: len(sandbox.log(status=200)) > 17, what="the middle of the run")
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        out, _ = process.communicate()
        found = re.search(r"run_\w+", out)
        assert found is not None, out
        before = prompts(sandbox, status=200)
        psutil.wait_procs(children, timeout=5)
        begun = time.time()
        done = subprocess.run(
            [*GORGON, "runs", "resume", found[0], "--json"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=40,
            check=False,
        )
        figure("gorgon run killed with kill -9, its resume", time.time() - begun)
        assert done.returncode == 0, done.stdout + done.stderr
        ran = Ran(json.loads(done.stdout))
        assert len(ran.outputs["items"]) > 0
        after = prompts(sandbox, status=200)
        again = after - before
        twice = [prompt for prompt in again if prompt in before]
        adopted = [step for step in ran.document["steps"] if step.get("adopted_from")]
        assert len(twice) <= 7, "at most what was in flight is asked again: six lanes and one beside them"
        assert len([step for step in adopted if step["kind"] == "agent"]) == len(before) - len(twice) > 10
        assert max(after.values()) <= 2
        assert all(step["cost_usd"] == 0 for step in adopted)


def test_nothing_is_left_behind(together: Cluster) -> None:
    """No run of this module hangs, and no step is held by anybody."""
    live = [run for run in together.services.runs()["items"] if run["finished_at"] is None]
    assert live == []
    with contextlib.closing(together.services.database.engine.connect()) as connection:
        assert list(connection.execute(select(steps.c.id).where(steps.c.status.in_([1, 2, 3])))) == []
