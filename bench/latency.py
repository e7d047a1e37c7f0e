"""Figures that are not a cost per step: latencies, throughput of slow steps, creation, memory, message sizes."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from itertools import pairwise
from statistics import median, quantiles

import redis

from bench import shapes
from bench.meters import resident_bytes
from bench.report import Figure
from bench.sides import Fleet, Gorgon
from gorgon_common import queues
from gorgon_common.workflow.plan import Plan
from tests.support.services import Services

FIRST, SECOND = queues.GITHUB, queues.NOTION
"""Queues of a benchmark's two workers, one each: a step that moves from one to the other needs a message."""
UNSERVED = (queues.SLACK, queues.GMAIL)
SENT = (
    ("of one step", shapes.plan(shapes.lone(1), "one", on=UNSERVED), 1),
    ("of 64 steps", shapes.plan(shapes.lone(64), "bundle", on=UNSERVED[:1]), 64),
    ("of a chain of 10", shapes.plan(shapes.chain(10), "canvas", on=UNSERVED), 10),
)
"""What is sent, the plan that sends it, and its steps."""
SLOW_STEPS, SLOW_MS, IN_FLIGHT = 2000, 300, 200
SLOW_WORKERS = 2


def hops(gorgon: Gorgon, *, runs: int = 5) -> list[Figure]:
    """Return the time from a step's start to its successor's start, if both take no time."""
    found = []
    for name, on, steps in (
        ("in one worker", (queues.CONTROL,), 200),
        ("across two queues", (FIRST, SECOND), 100),
    ):
        plan = shapes.plan(shapes.chain(steps), f"hop-{len(on)}", on=on)
        gaps: list[float] = []
        for _ in range(runs):
            starts = [started for started, _ in gorgon.times(gorgon.run(plan))]
            gaps += [(after - before) * 1000 for before, after in pairwise(starts)]
        p50, p95 = _percentiles(gaps)
        found.append(Figure(f"hop latency {name}, p50 / p95", p50, f"{p50:.1f} / {p95:.1f} ms"))
    return found


def first_step(gorgon: Gorgon, *, runs: int = 30) -> Figure:
    """Return the time from the call that submits a compiled workflow to the start of its first step."""
    plan = shapes.plan(shapes.chain(3), "first")
    waits = []
    for _ in range(runs):
        since = time.time()
        waits.append((gorgon.times(gorgon.run(plan))[0][0] - since) * 1000)
    p50, p95 = _percentiles(waits)
    return Figure("submission to first step, p50 / p95", p50, f"{p50:.1f} / {p95:.1f} ms")


def creation(gorgon: Gorgon, *, steps: int = 10_000, times: int = 3) -> Figure:
    """Return how long the submission of a large run takes: inputs, rows, commit, first messages."""
    plan = shapes.plan(shapes.dag(steps), "creation")
    spent = []
    for _ in range(times):
        since = time.perf_counter()
        submitted = gorgon.services.submit(plan, {})
        spent.append(time.perf_counter() - since)
        gorgon.wait(submitted.run_id)
    return Figure(f"creation of a run of {steps:,} steps", median(spent), f"{median(spent):.2f} s", 1.0, "≤ 1 s")


def memory(fleet: Fleet) -> Figure:
    """Return the memory of a worker after all its work."""
    megabytes = max(map(resident_bytes, fleet.pids)) / 1024**2
    return Figure("memory of a worker after all that (RSS)", megabytes, f"{megabytes:.0f} MB")


def messages(gorgon: Gorgon) -> list[Figure]:
    """Return the size of messages: of one step, of a bundle, of a canvas.  No worker consumes them."""
    found = []
    for name, plan, steps in SENT:
        sizes = sizes_of_messages(gorgon.services, gorgon.servers.redis_url, plan)
        largest = max(sizes)
        per_step = f", {sum(sizes) / steps:.0f} a step" if steps > 1 else ""
        found.append(Figure(f"bytes of a message {name}", largest, f"{largest:,}{per_step}"))
    return found


def sizes_of_messages(services: Services, redis_url: str, plan: Plan) -> list[int]:
    """Submit a plan whose queues no worker serves; return the bytes of each message that it sends, then cancel it."""
    submitted = services.submit(plan, {})
    sizes = []
    with redis.Redis.from_url(redis_url) as client:
        for key in client.scan_iter(_type="list"):
            for message in client.lrange(key, 0, -1):
                if str(json.loads(message)["headers"]["task"]).startswith("gorgon."):
                    sizes.append(len(message))
        services.cancel(submitted.run_id)
        for key in list(client.scan_iter(_type="list")):
            client.delete(key)
    return sizes


def slow_steps(gorgon: Gorgon, *, runs: int = 3) -> Figure:
    """Return how long 2,000 steps of 300 ms take with 200 in flight, from submission to the end; the median run."""
    plan = shapes.plan(shapes.lone(SLOW_STEPS), "slow", milliseconds=[SLOW_MS], on=[queues.HTTP])
    slots = IN_FLIGHT // SLOW_WORKERS
    with gorgon.workers([[queues.HTTP]] * SLOW_WORKERS, slots):
        spent = []
        for _ in range(runs):
            since = time.perf_counter()
            gorgon.run(plan)
            spent.append(time.perf_counter() - since)
    seconds = median(spent)
    ideal = SLOW_STEPS * SLOW_MS / 1000 / IN_FLIGHT
    name = f"{SLOW_STEPS:,} steps of {SLOW_MS} ms, {IN_FLIGHT} in flight (ideal {ideal:.1f} s)"
    return Figure(name, seconds, f"{seconds:.2f} s", 1.2 * ideal, f"≤ {1.2 * ideal:.1f} s")


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    return median(values), quantiles(values, n=20)[-1]
