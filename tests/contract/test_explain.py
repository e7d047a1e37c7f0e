"""What a run waits for, on SQLite and PostgreSQL: each reason from the rows that stand for it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from gorgon_common import queues
from gorgon_common.application.explanations import worded
from gorgon_common.clock import parse_time
from gorgon_common.engine.outcomes import REASONS, Snoozed
from gorgon_common.engine.records import ClaimCapacity, Claimed, ReadyStep, step_id
from gorgon_common.engine.rows import QUEUE_NUMBERS
from gorgon_common.errors import NotFound
from gorgon_common.operations.providers import DIMENSIONS
from gorgon_common.persistence.queries.explain import Explanations
from gorgon_common.persistence.queries.views import Views
from gorgon_common.persistence.queries.waits import _CLASSES
from gorgon_common.persistence.store import Store
from gorgon_common.scope import SYSTEM
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

    found = worded(Explanations(store.database, plan).explain(SYSTEM, store.info(run).public_id, step))
    return {entry["step"]: entry for entry in found["waiting"]}


def worker(store: Store, slots: int = 4, **fields: Any) -> Any:
    given = {"target": "sandbox", "home": "", "queues": [QUEUE], "slots": slots, "lease": 60.0, **fields}
    return store.register("host:1", **given)


def claim(store: Store, member: Any, run: int, row: int) -> Claimed:
    (held,) = store.claim_and_finish(member, ClaimCapacity(slow=1), claims=[step_id(run, row)]).mine
    return held


def head(run: int, row: int) -> ReadyStep:
    return ReadyStep(step_id(run, row), row, 2, QUEUE)


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
    store.enqueue([head(first, 0), head(first, 1)], "default")
    store.enqueue([head(second, 0)], "default")
    told = waits(store, second)["a"]
    assert (told["why"], told["queue"]["ahead"], told["queue"]["slots"]) == ("backlog", 2, 2)
    assert waits(store, first)["a"]["queue"]["ahead"] == 0


def test_other_targets_are_not_in_the_way(store: Store) -> None:
    worker(store)
    live, mine = make_run(store, PLAN, target="live"), make_run(store, PLAN)
    store.enqueue([head(live, 0)], "default")
    store.enqueue([head(mine, 0)], "default")
    assert waits(store, mine)["a"]["queue"]["ahead"] == 0


def test_it_runs_and_its_worker_may_be_lost(store: Store) -> None:
    run = make_run(store, PLAN)
    claim(store, worker(store, lease=20.0), run, 0)
    told = waits(store, run)["a"]
    assert (told["why"], "host:1" in told["what"]) == ("running", True)
    elapse(store, 21)
    assert waits(store, run)["a"]["why"] == "lost_worker"


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("retry", "retry"),
        *((dimension, "quota") for dimension in sorted(DIMENSIONS)),
        ("retry_after", "quota"),
        ("breaker", "breaker"),
        ("concurrency", "concurrency"),
        ("turn", "turn"),
        ("unreachable", "limiter"),
        ("budget", "budget"),
        ("something new", "waiting"),
    ],
)
def test_what_a_parked_step_waits_for_and_until_when(store: Store, reason: str, why: str) -> None:
    """By the reason that was stored, whatever the message says."""
    run = make_run(store, PLAN)
    held = claim(store, worker(store), run, 0)
    message = "a budget, a rate limit, a circuit breaker and calls in flight"
    store.park(held, Snoozed(seconds=90, reason=reason, message=message, calls=(), attempt=reason == "retry"))
    told = waits(store, run, "a")["a"]
    assert (told["why"], told["reason"]) == (why, reason)
    assert message in told["what"]
    assert told["since"] < told["until"]


def test_every_reason_has_a_class() -> None:
    assert set(_CLASSES) == set(REASONS)
    assert set(_CLASSES.values()) <= {
        "quota",
        "limiter",
        "breaker",
        "concurrency",
        "turn",
        "budget",
        "retry",
        "time",
        "event",
    }


def test_the_wait_is_told_to_machines_with_the_step_and_in_the_journal(store: Store) -> None:
    run = make_run(store, PLAN)
    views = Views(store.database, lambda plan_hash: Plan.from_json(store.plan_body(plan_hash)))
    public = store.info(run).public_id

    def step() -> dict[str, Any]:
        found: dict[str, Any] = views.run(SYSTEM, public, with_steps=True)["steps"][0]
        return found

    assert (step()["status"], step()["waits"]["why"], step()["waits"]["until"]) == ("ready", "queue", None)
    assert step()["waits"]["since"] == views.run(SYSTEM, public, with_steps=False)["created_at"]
    held = claim(store, worker(store), run, 0)
    store.park(held, Snoozed(seconds=90, reason="input_tokens", message="openai m: busy", calls=(), attempt=False))
    (event,) = (event for event in views.events(SYSTEM, public, after=0, limit=100) if event["kind"] == "step.waiting")
    waits_for = step()["waits"]
    assert (step()["reason"], waits_for["why"]) == ("openai m: busy", "input_tokens")
    assert event["data"] == {"why": "input_tokens", "until": waits_for["until"]}
    assert waits_for["since"] == event["at"]
    assert parse_time(waits_for["until"]) - parse_time(event["at"]) == timedelta(seconds=90)


def test_a_step_that_has_to_wait_again_for_the_same_has_waited_since_the_first_time(store: Store) -> None:
    run = make_run(store, PLAN)
    views = Views(store.database, lambda plan_hash: Plan.from_json(store.plan_body(plan_hash)))
    public = store.info(run).public_id

    def since(reason: str, *, attempt: bool = False) -> tuple[str, str]:
        """Claim the step, park it, and return since when it waits, and when that was written into the journal."""
        store.park(
            claim(store, worker(store), run, 0),
            Snoozed(seconds=0, reason=reason, message="m", calls=(), attempt=attempt),
        )
        shown = views.run(SYSTEM, public, with_steps=True)["steps"][0]["waits"]["since"]
        written = [
            event["at"]
            for event in views.events(SYSTEM, public, after=0, limit=100)
            if event["kind"] in ("step.waiting", "step.retry")
        ][-1]
        store.wake([step_id(run, 0)])
        return shown, written

    first, at = since("input_tokens")
    assert first == at
    second, at = since("input_tokens")
    assert (second, second < at) == (first, True)
    other, at = since("requests")
    assert other == at
    retry, at = since("retry", attempt=True)
    assert retry == at
    retry, at = since("retry", attempt=True)
    assert retry == at


def test_unknown_runs_and_steps_are_told(store: Store) -> None:
    run = make_run(store, PLAN)
    with pytest.raises(NotFound, match="no step 'x'") as raised:
        waits(store, run, "x")
    assert "a, b, c" in raised.value.hint
    with pytest.raises(NotFound, match="no run"):
        Explanations(store.database, lambda _: PLAN).explain(SYSTEM, "run_0")
