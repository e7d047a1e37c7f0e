"""What a run waits for, on SQLite and PostgreSQL: each reason from the rows that stand for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gorgon_common import queues
from gorgon_common.engine.records import Claimed, Head, Keep, step_id
from gorgon_common.engine.rows import QUEUE_NUMBERS
from gorgon_common.errors import NotFound
from gorgon_common.persistence.explain import Explanations
from gorgon_common.persistence.store import Store
from gorgon_common.workflow.plan import Plan
from tests.support.engine import agent, elapse, make_run, open_store, plan_of

PLAN = plan_of(agent("a"), agent("b"), agent("c", 0, 1))
QUEUE = QUEUE_NUMBERS[queues.OPENAI]


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    made = open_store(database_url)
    yield made
    made.close()


def waits(store: Store, run: int, step: str | None = None) -> dict[str, dict[str, Any]]:
    def plan(plan_hash: str) -> Plan:
        return Plan.from_json(store.plan_body(plan_hash))

    found = Explanations(store.database, plan).explain(store.info(run).public_id, step)
    return {entry["step"]: entry for entry in found["waiting"]}


def worker(store: Store, slots: int = 4, **fields: Any) -> Any:
    given = {"target": "sandbox", "home": "", "queues": [QUEUE], "slots": slots, "lease": 60.0, **fields}
    return store.register("host:1", **given)


def claim(store: Store, member: Any, run: int, row: int) -> Claimed:
    (held,) = store.tick(member, Keep(slow=1), claims=[step_id(run, row)]).mine
    return held


def head(run: int, row: int) -> Head:
    return Head(step_id(run, row), row, 2, QUEUE)


def test_a_dependency_is_named(store: Store) -> None:
    told = waits(store, make_run(store, PLAN))["c"]
    assert (told["why"], told["on"], told["until"]) == ("dependency", ["a", "b"], None)


def test_nobody_serves_the_queue(store: Store) -> None:
    run = make_run(store, PLAN)
    worker(store, queues=[QUEUE_NUMBERS[queues.SLACK]])
    worker(store, target="live")
    told = waits(store, run)["a"]
    assert told["why"] == "no_worker"
    assert "gorgon worker -q openai" in told["what"]
    worker(store)
    assert waits(store, run)["a"]["why"] == "queue"


def test_a_worker_that_is_gone_serves_nothing(store: Store) -> None:
    run = make_run(store, PLAN)
    worker(store, lease=5.0)
    elapse(store, 6)
    assert waits(store, run)["a"]["why"] == "no_worker"


def test_the_place_on_the_backlog(store: Store) -> None:
    worker(store, slots=2)
    first, second = make_run(store, PLAN), make_run(store, PLAN)
    store.shelve([head(first, 0), head(first, 1)], "default")
    store.shelve([head(second, 0)], "default")
    told = waits(store, second)["a"]
    assert (told["why"], told["queue"]["ahead"], told["queue"]["slots"]) == ("backlog", 2, 2)
    assert waits(store, first)["a"]["queue"]["ahead"] == 0


def test_other_targets_are_not_in_the_way(store: Store) -> None:
    worker(store)
    live, mine = make_run(store, PLAN, target="live"), make_run(store, PLAN)
    store.shelve([head(live, 0)], "default")
    store.shelve([head(mine, 0)], "default")
    assert waits(store, mine)["a"]["queue"]["ahead"] == 0


def test_it_runs_and_its_worker_may_be_lost(store: Store) -> None:
    run = make_run(store, PLAN)
    claim(store, worker(store, lease=20.0), run, 0)
    told = waits(store, run)["a"]
    assert (told["why"], "host:1" in told["what"]) == ("running", True)
    elapse(store, 21)
    assert waits(store, run)["a"]["why"] == "lost_worker"


@pytest.mark.parametrize(
    ("reason", "message", "why"),
    [
        ("retry", "The server failed (HTTP 500)", "retry"),
        ("waiting", "rate limit: slow down", "quota"),
        ("waiting", "openai m: rate limit on output tokens", "quota"),
        ("waiting", "openai m: the provider has asked for a pause", "quota"),
        ("waiting", "openai m: the circuit breaker is open, most of the last calls failed", "breaker"),
        ("waiting", "openai m: as many calls are in flight as may be", "concurrency"),
        ("waiting", "openai m: other calls are first", "turn"),
        ("waiting", "the limiter cannot be reached", "limiter"),
        ("waiting", "budget: The limit of the run is $1.00", "budget"),
        ("waiting", "until something happens", "waiting"),
    ],
)
def test_what_a_parked_step_waits_for_and_until_when(store: Store, reason: str, message: str, why: str) -> None:
    run = make_run(store, PLAN)
    held = claim(store, worker(store), run, 0)
    store.park(held, seconds=90, reason=reason, message=message, calls=(), attempt=reason == "retry")
    told = waits(store, run, "a")["a"]
    assert told["why"] == why
    assert message in told["what"]
    assert told["since"] < told["until"]


def test_unknown_runs_and_steps_are_told(store: Store) -> None:
    run = make_run(store, PLAN)
    with pytest.raises(NotFound, match="no step 'x'") as raised:
        waits(store, run, "x")
    assert "a, b, c" in raised.value.hint
    with pytest.raises(NotFound, match="no run"):
        Explanations(store.database, lambda _: PLAN).explain("run_0")
