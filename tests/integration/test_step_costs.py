"""What a step costs in transactions, messages and bytes: what `make bench` measures and is not noisy.

A real PostgreSQL and a real Redis that nobody else uses, and a worker in this process.  The limits have room for a
slow machine (whoever is slow commits smaller batches), but none for a transaction or a message of each step's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import pytest

from bench import latency, shapes
from bench.meters import Meter, Reading
from gorgon_common import queues
from gorgon_common.canvas.celery import Counts, make_app
from gorgon_common.engine import worker_loop
from gorgon_common.persistence import upgrade
from gorgon_common.settings import Settings
from gorgon_common.workflow.plan import Plan
from gorgon_worker.embedded import embedded
from tests.support.running import eventually
from tests.support.servers import postgres, redis_server
from tests.support.services import Services, build

STEPS = 400
SLOTS = 8


@dataclass
class Stand:
    """Servers, services and a worker that serves `control`."""

    services: Services
    meter: Meter
    redis_url: str

    def run(self, plan: Plan) -> None:
        run_id = self.services.submit(plan, {}).run_id

        def ended() -> bool:
            return self.services.run(run_id)["finished_at"] is not None

        eventually(ended, within=60, what="the run's end")
        assert self.services.run(run_id)["status"] == "succeeded"

    def cost(self, plan: Plan, steps: int) -> Reading:
        """Return what a step costs in the plan's second run: a first one teaches the worker the plan."""
        self.run(plan)
        before = self.meter.read()
        self.run(plan)
        return self.meter.read().since(before, steps)


@pytest.fixture(scope="module")
def stand() -> Iterator[Stand]:
    with ExitStack() as stack:
        # Steps that end within this time commit together.  It is longer here, so that the number of commits does not
        # depend on the speed of the machine, nor on coverage, with which each step takes several times as long.
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(worker_loop, "BATCH_SECONDS", 8 * worker_loop.BATCH_SECONDS)
        database_url = stack.enter_context(postgres(fsync=False))
        redis_url = stack.enter_context(redis_server())
        upgrade(database_url)
        nowhere = "http://127.0.0.1:9"  # these steps call nobody
        settings = Settings(database_url=database_url, redis_url=redis_url, sandbox_url=nowhere)
        services = stack.enter_context(closing(build(settings)))
        meter = stack.enter_context(closing(Meter(database_url, redis_url)))
        stack.enter_context(embedded(services, queues=[queues.CONTROL], slots=SLOTS, home="", target="sandbox"))
        yield Stand(services, meter, redis_url)


@pytest.mark.parametrize(
    ("make", "commits", "messages", "commands"),
    [
        (lambda steps: shapes.plan(shapes.chain(steps)), 1.1, 0.01, 0.5),
        (lambda steps: shapes.plan(shapes.fan_out(steps)), 0.15, 0.04, 1.5),
        (lambda steps: shapes.plan(shapes.dag(steps)), 0.25, 0.01, 0.5),
        (shapes.map_reduce, 0.15, 0.04, 1.5),
    ],
    ids=["chain", "fan-out", "dag", "map-reduce"],
)
def test_a_step_costs_few_transactions_messages_and_bytes(
    stand: Stand, make: Callable[[int], Plan], commits: float, messages: float, commands: float
) -> None:
    cost = stand.cost(make(STEPS), STEPS)
    assert 0 < cost.commits <= commits
    assert 0 < cost.messages <= messages
    assert 0 < cost.commands <= commands
    assert 500 < cost.wal_bytes <= 1600
    assert 0 < cost.redis_bytes <= 700


@pytest.mark.parametrize("shape", [shapes.chain, shapes.fan_out, shapes.dag])
def test_a_step_of_a_larger_run_costs_no_more(stand: Stand, shape: Callable[[int], shapes.Deps]) -> None:
    small = stand.cost(shapes.plan(shape(200)), 200)
    large = stand.cost(shapes.plan(shape(1000)), 1000)
    assert large.commits <= 1.3 * small.commits
    assert large.messages <= 1.3 * small.messages
    assert large.wal_bytes <= 1.3 * small.wal_bytes
    assert large.redis_bytes <= 1.3 * small.redis_bytes


@pytest.mark.parametrize(("name", "limit"), [("one", 1250), ("bundle", 2200), ("canvas", 6500)])
def test_messages_are_small(stand: Stand, name: str, limit: int) -> None:
    plans = {plan.name: plan for _, plan, _ in latency.SENT}
    sizes = latency.sizes_of_messages(stand.services, stand.redis_url, plans[name])
    assert len(sizes) == 1
    assert 500 < sizes[0] <= limit


def test_who_sends_a_chord_waits_for_no_result(stand: Stand) -> None:
    stand.run(shapes.plan(shapes.fan_out(200)))
    assert stand.meter.redis.pubsub_channels("*") == []


def test_the_count_of_a_chord_on_a_unix_socket() -> None:
    with redis_server(unix=True) as url:
        settings = Settings(redis_url=url, database_url="sqlite:///unused.db")
        backend = make_app(settings.broker_url).backend
        assert isinstance(backend, Counts)
        assert backend.client.ping()
        backend.client.close()
