"""Quotas through the whole engine: real workers, PostgreSQL, Redis and SDKs against the sandbox.

* A quiet team's run of one step, alone and behind a noisy team with 5,000 queued steps that want the whole quota.
* Redis (limiter and broker) is down for 20 s in the middle of a run that a budget counts.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import money
from bench.figures import Target
from gorgon_common.persistence import upgrade
from tests.support.processes import Cluster, RedisProcess, cluster
from tests.support.running import FINISHED
from tests.support.sandbox import Sandbox, start_sandbox
from tests.support.servers import postgres

WORKERS, SLOTS = 2, 50
NOISY, QUICK_NOISY = 5_000, 1_500
LIMIT = 1_200
"""Requests per minute, one every 50 ms: few enough that the quota is the bottleneck, and not the CPU."""
LATENCY = "1s"
PAUSE = 1.0
"""Seconds between two runs of the quiet team."""
BUDGET = "5"
DOWN_ITEMS, DOWN_LIMIT, DOWN_SECONDS = 600, 900, 20.0
MODEL = "gpt-6.1-terra"
"""Its tokens cost whole micro-dollars, so the sum of rounded costs is the cost of the sum."""
_QUIET = f"""
name: quiet
team: quiet
steps:
  - {{id: ask, provider: openai, model: {MODEL}, max_tokens: 200, prompt: "Say {{{{inputs.part}}}}."}}
inputs: {{part: string}}
"""
_MANY = f"""
name: many
team: noisy
steps:
  - id: ask
    provider: openai
    model: {MODEL}
    max_tokens: 200
    map: {{over: "{{{{inputs.parts}}}}", as: part, max_parallel: 5000, max_items: 5000}}
    prompt: "Say {{{{part}}}}."
inputs: {{parts: array}}
"""


def measure(*, quick: bool, say: Callable[[str], None]) -> list[Target]:
    """Measure and return the figures."""
    with contextlib.ExitStack() as stack:
        sandbox = stack.enter_context(start_sandbox(seed=1, latency=LATENCY))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gorgon-bench-")))
        admin = stack.enter_context(postgres(fsync=True))
        upgrade(admin)
        server = RedisProcess(folder)
        stack.callback(server.stop)
        workers = stack.enter_context(cluster(admin, server.url, sandbox, folder))
        for _ in range(WORKERS):
            workers.worker("openai", slots=SLOTS)
        return [*quiet(workers, sandbox, quick=quick, say=say), *down(workers, sandbox, server, say=say)]


def quiet(workers: Cluster, sandbox: Sandbox, *, quick: bool, say: Callable[[str], None]) -> list[Target]:
    """Measure a quiet team, alone and behind a noisy one."""
    sandbox.limits({"provider": "openai", "requests": LIMIT})
    rounds = 10 if quick else 25
    for _ in range(5):
        _once(workers, 0)  # warms up imports, connections and the learned limit
    say(f"engine: {rounds} runs of one step, alone")
    alone = [_once(workers, number) for number in range(rounds)]
    count = QUICK_NOISY if quick else NOISY
    say(f"engine: the same behind {count:,} queued steps")
    noisy = _submit(workers, _MANY, {"parts": [str(number) for number in range(count)]})
    _until(lambda: sandbox.count(by="status")[0]["count"] >= rounds + 205, "the noise")
    since = time.time()
    behind = [_once(workers, number) for number in range(rounds)]
    until = time.time()
    entries = sandbox.log()
    asked = [entry for entry in entries if since <= entry["time"] < until]
    served = sum(entry["status"] == 200 for entry in asked)
    refused = sum(entry["status"] == 429 for entry in asked)
    running = workers.services.run(noisy)["status"] == "running"
    workers.services.cancel(noisy)
    ratio = _p95(behind) / _p95(alone)
    shown = f"p95 {_p95(alone):.3f} s alone, {_p95(behind):.3f} s behind; replies of {LATENCY}"
    shown += "" if running else "; THE NOISE HAD ENDED"
    return [
        Target("quiet team behind a noisy one: time of a run", ratio if running else 99.0, "ratio", 1.5, True, shown),
        Target("… quota used by the real engine", served / (LIMIT / 60 * (until - since)), "percent"),
        Target("… refused", refused / max(1, len(asked)), "percent", 0.001, True, f"{refused} of {len(asked):,}"),
    ]


def down(workers: Cluster, sandbox: Sandbox, server: RedisProcess, *, say: Callable[[str], None]) -> list[Target]:
    """Measure while limiter and broker are down for some time."""
    time.sleep(3)
    sandbox.clear_log()
    sandbox.limits({"provider": "openai", "requests": DOWN_LIMIT})
    workers.services.set_budget("team:noisy", period="month", usd=BUDGET)
    before = money.paid(workers.services)
    say(f"engine: Redis away for {DOWN_SECONDS:.0f} s in a run of {DOWN_ITEMS} steps")
    run = _submit(workers, _MANY, {"parts": [str(number) for number in range(DOWN_ITEMS)]})
    _until(lambda: len(sandbox.log(status=200)) >= 100, "a hundred calls")
    server.stop()
    time.sleep(DOWN_SECONDS)
    server.start()
    until = time.monotonic() + 150
    while (found := workers.services.run(run))["status"] not in FINISHED and time.monotonic() < until:
        time.sleep(0.5)
    entries = sandbox.log()
    good = [entry for entry in entries if entry["status"] == 200]
    refused = sum(entry["status"] == 429 for entry in entries)
    most = _busiest([entry["time"] for entry in good])
    books = workers.services.budgets
    spent, billed = money.paid(workers.services) - before, money.bill(sandbox)
    return [
        Target(
            "limiter and broker away 20 s: steps lost",
            DOWN_ITEMS - len({entry["prompt"] for entry in good}) if found["status"] == "succeeded" else DOWN_ITEMS,
            "count",
            0,
            True,
            f"the run has {found['status']}; {refused} times 429",
        ),
        Target("… most calls in any 60 s", most, "count", DOWN_LIMIT, True, f"the limit is {DOWN_LIMIT}"),
        Target("… micro-dollars over the team's budget", money.over(books), "count", 0, True),
        Target("… accounts that are not what their ledger says", not money.replayed(books), "count", 0, True),
        Target("… ledger − the sandbox's bill, micro-dollars", abs(spent - billed), "count", 0, True, f"of {billed:,}"),
    ]


def _until(done: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 60
    while not done():
        if time.monotonic() > until:
            raise RuntimeError(f"{what} did not come")
        time.sleep(0.1)


def _submit(workers: Cluster, text: str, inputs: object) -> str:
    plan, _ = workers.services.read(text)
    return workers.services.submit(plan, json.loads(json.dumps(inputs)), target="sandbox").run_id


def _once(workers: Cluster, number: int) -> float:
    """Return how long a run of one step takes, according to its rows."""
    time.sleep(PAUSE)
    began = time.monotonic()
    run = _submit(workers, _QUIET, {"part": f"{number} {began}"})
    while workers.services.run(run)["status"] not in FINISHED:
        time.sleep(0.03)
    return time.monotonic() - began


def _p95(values: Sequence[float]) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * 0.95))]


def _busiest(times: Sequence[float], seconds: float = 60.0) -> int:
    first, most = 0, 0
    for last, at in enumerate(times):
        while times[first] <= at - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most
