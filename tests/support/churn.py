"""Runs under churn: processes are killed every other second while many runs are in progress, then the books are
audited.

Every run has the same shape (agents, a map, a group, a loop, a retry, a command, a fallback) and known outputs.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import select

from gorgon_common.client.http import Client
from gorgon_common.errors import Unavailable
from gorgon_common.ids import new_id
from gorgon_common.persistence.lost_calls import UNKNOWN
from gorgon_common.persistence.reports import run_of
from gorgon_common.persistence.tables import ledger, runs, step_deaths, steps, workers
from tests.support.processes import Cluster, Process
from tests.support.running import FINISHED
from tests.support.sandbox import Sandbox

ITEMS = 6
NAME, UNLIMITED = "churn", "unlimited"
"""The two workflows: a budget counts the runs of the first, none counts those of the second."""
_WORKFLOW = """
name: NAME
LIMITS
inputs: {tag: {type: string, required: true}, n: {type: array, items: {type: integer}, required: true}}
steps:
  - {id: first, prompt: "[[sandbox: delay=200ms text=first-{{inputs.tag}}]] first {{inputs.tag}}"}
  - id: each
    depends_on: first
    map: {over: "{{inputs.n}}", as: n, max_parallel: 3}
    provider: openai
    prompt: "[[sandbox: delay=300ms text=each-{{n}}-{{inputs.tag}}]] each {{inputs.tag}} {{n}}"
  - id: both
    depends_on: first
    steps:
      - {id: left, prompt: "[[sandbox: delay=250ms text=left-{{inputs.tag}}]] left {{inputs.tag}}"}
      - {id: right, run: [sh, -c, 'sleep 0.2; echo "$1"', sh, "{{inputs.tag}}"]}
  - id: rounds
    depends_on: first
    loop: {until: turn.done, max: 3}
    steps:
      - id: turn
        output: {done: boolean, said: string}
        prompt: >-
          [[sandbox: delay=150ms json={"done": {{index >= 1}}, "said": "turn-{{index}}-{{inputs.tag}}"}]]
          turn {{inputs.tag}} {{index}}
  - id: again
    depends_on: first
    provider: openai
    retry: {max: 8, initial: 100ms}
    prompt: >-
      [[sandbox: status=500 times=1 key={{inputs.tag}}]] [[sandbox: text=again-{{inputs.tag}}]] again {{inputs.tag}}
  - id: other
    depends_on: first
    run: [sh, -c, "sleep 0.1; exit 3"]
    on_failure: fallback
    fallback: {type: default_value, value: none}
  - id: last
    when: size(each.output) == ITEMS
    prompt: "[[sandbox: delay=150ms text=last-{{inputs.tag}}]] last {{inputs.tag}} {{again.output}} {{both.status}}"
outputs:
  first: "{{first.output}}"
  each: "{{each.output}}"
  left: "{{both.output.left}}"
  right: "{{both.output.right}}"
  rounds: "{{rounds.output.turn.said}}"
  again: "{{again.output}}"
  other: "{{other.output}}"
  last: "{{default(last.output, '')}}"
"""


def workflow(*, limits: str = "", name: str = NAME) -> str:
    """Return the workflow; `limits`: the content of its `limits:`."""
    text = _WORKFLOW.replace("LIMITS", f"limits: {{{limits}}}" if limits else "")
    return text.replace("NAME", name).replace("ITEMS", str(ITEMS))


def inputs_of(tag: str) -> dict[str, Any]:
    return {"tag": tag, "n": list(range(ITEMS))}


def outputs_of(tag: str) -> dict[str, Any]:
    """Return the expected outputs of a run."""
    return {
        "first": f"first-{tag}",
        "each": [f"each-{number}-{tag}" for number in range(ITEMS)],
        "left": f"left-{tag}",
        "right": f"{tag}\n",
        "rounds": f"turn-1-{tag}",
        "again": f"again-{tag}",
        "other": "none",
        "last": f"last-{tag}",
    }


@dataclass
class Findings:
    """The results after all runs have ended."""

    runs: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    stuck: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    calls: int = 0
    unknown: int = 0
    unaccounted: list[str] = field(default_factory=list)
    """Calls that are in the sandbox's log but not in the ledger."""
    recovered: list[float] = field(default_factory=list)
    """Seconds from the death of a worker until another worker repeated the calls of its steps."""
    deaths: int = 0
    crashed: list[str] = field(default_factory=list)
    """The last lines of processes that ended although nobody had killed them."""

    def p95(self) -> float:
        ordered = sorted(self.recovered)
        return ordered[int(len(ordered) * 0.95)] if ordered else 0.0


class Churn:
    """Kills a process every `every` seconds, and starts another in its place."""

    def __init__(self, made: Cluster, *, workers: int, slots: int, every: float, seed: int) -> None:
        self.cluster = made
        self.slots = slots
        self.every = every
        self.chance = random.Random(seed)
        self.killed_at: dict[int, float] = {}
        self.kills: Counter[str] = Counter()
        self.crashed: list[str] = []
        for _ in range(workers):
            made.worker(slots=slots, wait=False)
        self.api = self._api()
        for process in (*made.processes, self.api):
            process.wait_ready(180)
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._forever, daemon=True)

    def _api(self) -> Process:
        environment = {**self.cluster.environment, "GORGON_LOG_LEVEL": "info", "GORGON_API_KEY": "churn"}
        return Process("api", "--port", "0", ready="Gorgon API at", environment=environment)

    def client(self) -> Client:
        """Return a client of the API.  Raises Unavailable if the API is not listening yet."""
        found = re.search(r"http://\S+", self.api.line)
        if found is None:
            raise Unavailable("The API is starting.")
        return Client(found[0], api_key="churn")

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop killing, so that the runs can end."""
        self._over.set()
        self._thread.join(60)

    def close(self) -> None:
        self.stop()
        self.api.terminate()

    def _forever(self) -> None:
        while not self._over.wait(self.every):
            self._replace_crashed()
            self._kill()

    def _replace_crashed(self) -> None:
        for process in [process for process in self.cluster.processes if not process.alive]:
            self.crashed.append("".join(process.said[-5:]))
            self.cluster.processes.remove(process)
            self.cluster.worker(slots=self.slots, wait=False)
        if not self.api.alive:
            self.crashed.append("".join(self.api.said[-5:]))
            self.api = self._api()

    def _kill(self) -> None:
        at_work = [process for process in (*self.cluster.processes, self.api) if process.ready]
        if not at_work:  # on a busy machine, a worker killed before it has begun has nothing to lose
            return
        victim = self.chance.choice(at_work)
        victim.kill()
        if victim is self.api:
            self.kills["api"] += 1
            self.api = self._api()
            return
        self.cluster.processes.remove(victim)
        self.killed_at[victim.pid] = time.time()
        self.kills["worker"] += 1
        self.cluster.worker(slots=self.slots, wait=False)


def _run_id(client: Client, tag: str, text: str, key: str) -> str:
    made = client.submit(source=text, inputs=inputs_of(tag), target="sandbox", idempotency_key=key)
    return str(made["run_id"])


def submit(churn: Churn, tag: str, text: str, until: float) -> str:
    """Submit over HTTP, and retry with the same key while the API is being killed; returns the run's id."""
    key = new_id("churn")
    while True:
        try:
            with churn.client() as client:
                return _run_id(client, tag, text, key)
        except Unavailable:
            if time.time() > until:
                raise
            time.sleep(0.1)


def run_churn(
    made: Cluster,
    sandbox: Sandbox,
    *,
    runs_: int,
    seconds: float,
    every: float = 2.0,
    workers: int = 3,
    slots: int = 8,
    grace: float = 120.0,
    seed: int = 1,
) -> Findings:
    """Spread runs over some seconds of churn, wait until they end, and audit the books."""
    churn = Churn(made, workers=workers, slots=slots, every=every, seed=seed)
    kinds = [
        workflow(),
        workflow(limits="max_parallel: 4"),
        workflow(limits="budget_usd: 1.0"),
        workflow(name=UNLIMITED, limits="max_parallel: 3"),
    ]
    made.services.set_budget(f"workflow:{NAME}", period="month", usd="50")
    begun = time.time()
    submitted: dict[str, Future[str]] = {}
    churn.start()
    try:
        with ThreadPoolExecutor(16) as threads:
            for number in range(runs_):
                tag, text = f"t{seed}x{number}", kinds[number % len(kinds)]
                submitted[tag] = threads.submit(submit, churn, tag, text, begun + seconds + grace)
                time.sleep(max(0.0, begun + seconds * (number + 1) / runs_ - time.time()))
            churn.stop()
        tags = {future.result(): tag for tag, future in submitted.items()}
        until = time.time() + grace
        while time.time() < until and any(made.services.run(run)["status"] not in FINISHED for run in tags):
            time.sleep(0.2)
    finally:
        churn.close()
    return _read(made, sandbox, churn, tags)


def _read(made: Cluster, sandbox: Sandbox, churn: Churn, tags: Mapping[str, str]) -> Findings:
    found = Findings(runs=len(tags), kills=churn.kills, crashed=churn.crashed)
    for run_id, tag in tags.items():
        run = made.services.run(run_id)
        if run["status"] not in FINISHED:
            found.stuck.append(f"{run_id} is {run['status']}")
        elif run["status"] != "succeeded":
            found.failed.append(f"{run_id}: {run['status']}: {run['error']}")
        elif run["outputs"] != outputs_of(tag):
            found.wrong.append(f"{run_id}: {run['outputs']}")
    _account(made, sandbox, found)
    _recoveries(made, churn, found)
    return found


def _account(made: Cluster, sandbox: Sandbox, found: Findings) -> None:
    """Compare the sandbox's log with the ledger: each call by its number, the others one by one for each step."""
    plans = made.services.knowledge.plan
    query = (
        select(ledger.c.request_id, ledger.c.outcome, steps.c.node, runs.c.plan_hash, runs.c.inputs)
        .select_from(
            ledger.join(steps, steps.c.id == ledger.c.step_id).join(runs, run_of(ledger.c.step_id) == runs.c.id)
        )
        .where(ledger.c.provider != "none")
    )
    known: set[str] = set()
    spare: Counter[tuple[str, str]] = Counter()
    with made.services.database.read() as connection:
        for row in connection.execute(query):
            found.unknown += row.outcome == UNKNOWN
            if row.request_id:
                known.add(row.request_id)
            else:
                name = plans(row.plan_hash).nodes[row.node].id.rstrip("[]#")
                tag = row.inputs.split('"tag":"')[1].split('"')[0]
                spare[name, tag] += 1
    for entry in sandbox.log():
        found.calls += 1
        if entry["request_id"] in known:
            continue
        name, tag, *_ = entry["prompt"].split()
        spare[name, tag] -= 1
        if spare[name, tag] < 0:
            found.unaccounted.append(f"{name} of {tag}: {entry['request_id']}, status {entry['status']}")


def _recoveries(made: Cluster, churn: Churn, found: Findings) -> None:
    """Measure the time from each kill to the next call of each step that the dead worker held."""
    begins: dict[int, list[tuple[int, float]]] = defaultdict(list)
    with made.services.database.read() as connection:
        for row in connection.execute(select(ledger).where(ledger.c.outcome != UNKNOWN)):
            begins[row.step_id].append((row.token, _seconds(row.at) - row.latency_ms / 1000))
        died = connection.execute(
            select(step_deaths.c.step_id, step_deaths.c.token, workers.c.name).join(
                workers, workers.c.id == step_deaths.c.owner
            )
        ).all()
    found.deaths = len(died)
    for row in died:
        killed = churn.killed_at.get(int(row.name.rpartition(":")[2]))
        begun = [at for token, at in begins.get(row.step_id, ()) if token == row.token + 1]
        if killed is not None and begun:
            found.recovered.append(begun[0] - killed)


def _seconds(moment: datetime) -> float:
    return moment.timestamp()
