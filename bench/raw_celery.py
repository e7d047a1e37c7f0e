"""Raw Celery, written as one would without Gorgon: the other side of the benchmark.  It imports nothing from Gorgon.

Each step is a task that inserts one row.  Successors are determined in one of two ways:

* *canvas*: Celery's own chain, group and chord;
* *counters*: the run's edges and in-degrees are in Redis; one script call per step decrements them and returns the
  ready steps.

Both are as lean as stock Celery allows: JSON, early acknowledgement, no results except those that a chord counts, no
events, no remote control, prefetching, a threads pool, one prepared insert on one connection per thread, one pooled
Redis client, one producer for all messages of a step.  Neither survives the loss of a message or of a worker.

RAW_REDIS_URL and RAW_DATABASE_URL configure the servers; a worker is `celery -A bench.raw_celery worker -P threads …`.
"""

from __future__ import annotations

import functools
import os
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg
import redis
from celery import Celery, chain, chord, group

REDIS_URL = os.environ.get("RAW_REDIS_URL", "redis://127.0.0.1:6379/1")
DATABASE_URL = os.environ.get("RAW_DATABASE_URL", "")
TABLE = (
    "CREATE TABLE IF NOT EXISTS raw_steps (run text, step int, status smallint NOT NULL, output text,"
    " finished_at timestamptz NOT NULL, PRIMARY KEY (run, step))"
)
INSERT = "INSERT INTO raw_steps VALUES (%s, %s, 5, %s, clock_timestamp())"
EXPIRES = 3600
# Returns the steps that become ready when a step ends: successors with no other open dependency.
READY = """
local following = redis.call('HGET', KEYS[1], ARGV[1])
local ready = {}
if following then
  for step in string.gmatch(following, '%d+') do
    if redis.call('HINCRBY', KEYS[2], step, -1) == 0 then ready[#ready + 1] = tonumber(step) end
  end
end
return ready
"""

app = Celery("raw", broker=REDIS_URL, backend=REDIS_URL, set_as_current=False)
app.conf.update(
    task_serializer="json",
    accept_content=["json"],
    task_ignore_result=True,
    task_default_queue="raw",
    result_expires=EXPIRES,
    worker_disable_rate_limits=True,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    task_send_sent_event=False,
    worker_hijack_root_logger=False,
    broker_connection_retry_on_startup=True,
)
_local = threading.local()


@functools.cache
def client() -> Any:
    """Return this process's Redis client."""
    return redis.Redis.from_url(REDIS_URL)


@functools.cache
def ready_script() -> Any:
    """Return the registered script (EVALSHA)."""
    return client().register_script(READY)


def record(run: str, step: int) -> None:
    """Insert the step's row: one transaction."""
    connection: psycopg.Connection[Any] | None = getattr(_local, "connection", None)
    if connection is None:
        connection = _local.connection = psycopg.connect(DATABASE_URL, autocommit=True)
    connection.execute(INSERT, (run, step, ""), prepare=True)


def over(run: str) -> None:
    """Notify the process that waits for the run."""
    client().rpush(f"over:{run}", 1)


# Celery's own canvas


@app.task(name="raw.link")
def link(run: str, step: int) -> None:
    """One step of a chain."""
    record(run, step)


@app.task(name="raw.part", ignore_result=False)
def part(run: str, step: int) -> None:
    """One step of a chord's header, which must have a result for the chord to count it."""
    record(run, step)


@app.task(name="raw.last")
def last(run: str, step: int) -> None:
    """The last step of a canvas."""
    record(run, step)
    over(run)


def send_canvas(shape: str, steps: int) -> str:
    """Publish a shape as Celery's canvas; return the run."""
    run = uuid.uuid4().hex
    if shape == "chain":
        whole = chain(*[link.si(run, step) for step in range(steps - 1)], last.si(run, steps - 1), app=app)
    elif shape == "fan-out":
        header = group([part.si(run, step) for step in range(1, steps - 1)], app=app)
        whole = chain(link.si(run, 0), chord(header, last.si(run, steps - 1), app=app), app=app)
    elif shape == "map-reduce":
        header = group([part.si(run, step) for step in range(steps - 1)], app=app)
        whole = chord(header, last.si(run, steps - 1), app=app)
    else:
        raise ValueError(f"Celery's canvas has no {shape}")
    whole.apply_async()
    return run


# In-degree counters


@app.task(name="raw.flow")
def flow(run: str, step: int) -> None:
    """One step of any graph."""
    record(run, step)
    publish(run, ready_script()(keys=[f"edges:{run}", f"open:{run}"], args=[step]))


def publish(run: str, ready: Sequence[int]) -> None:
    """Send a message for each step that is ready; step -1 is the end of the run."""
    if not ready:
        return
    if ready[0] == END:
        over(run)
        return
    with app.producer_pool.acquire(block=True) as producer:
        for step in ready:
            flow.apply_async((run, step), producer=producer)


END = 1 << 30
"""The pseudo-step at the end of a run, which depends on every step without successors."""


def send_counters(deps: Sequence[Sequence[int]]) -> str:
    """Write a graph's edges and in-degrees to Redis and publish the steps without dependencies; return the run."""
    run = uuid.uuid4().hex
    following: list[list[int]] = [[] for _ in deps]
    for step, before in enumerate(deps):
        for one in before:
            following[one].append(step)
    sinks = [step for step, after in enumerate(following) if not after]
    for step in sinks:
        following[step].append(END)
    edges = {step: ",".join(map(str, after)) for step, after in enumerate(following)}
    counts = {step: len(before) for step, before in enumerate(deps) if before}
    with client().pipeline(transaction=False) as pipe:
        pipe.hset(f"edges:{run}", mapping=edges)
        pipe.hset(f"open:{run}", mapping={**counts, END: len(sinks)})
        pipe.expire(f"edges:{run}", EXPIRES)
        pipe.expire(f"open:{run}", EXPIRES)
        pipe.execute()
    publish(run, [step for step, before in enumerate(deps) if not before])
    return run


def wait(run: str, seconds: float) -> None:
    """Wait for the end of a run.  Raises TimeoutError."""
    if waiting().blpop([f"over:{run}"], timeout=seconds) is None:
        raise TimeoutError(f"raw Celery did not end a run within {seconds:.0f} s")


@functools.cache
def waiting() -> Any:
    """Return the client for blocking calls, which must have no timeout of its own."""
    return redis.Redis.from_url(REDIS_URL, socket_timeout=None)
