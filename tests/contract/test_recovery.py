"""Steps of dead workers come back, whatever the worker did after it was given up; only the guilty are blamed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import delete, update

from gorgon_common.engine import poison
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import Children, ClaimCapacity, Refusal, Released, Renewal, Weight, step_id
from gorgon_common.engine.states import StepStatus
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.store import Store, Worker
from gorgon_common.persistence.tables import step_deaths, steps, workers
from gorgon_common.workflow.plan import Kind
from tests.support.engine import NOTHING, OPENAI, Desk, agent, elapse, make_run, node, paid, plan_of, row, rows_of

S = StepStatus


@pytest.fixture
def desk(stores: tuple[Store, Store]) -> Desk:
    return Desk(stores[0], lease=1e6)


def expire(desk: Desk, worker: Worker) -> None:
    """Its lease has run out, and no sweep has seen it."""
    elapse(desk.store, 20)


def reap(desk: Desk, worker: Worker) -> None:
    """Its lease has run out, and a sweep has marked it."""
    elapse(desk.store, 20)
    desk.store.reap(home="")
    (marked,) = desk.all(workers, workers.c.id == worker.owner)
    assert marked.reaped


def forget(desk: Desk, worker: Worker) -> None:
    """Its row is gone."""
    with desk.store.database.write() as connection:
        connection.execute(delete(workers).where(workers.c.id == worker.owner))


GONE = pytest.mark.parametrize("gone", [expire, reap, forget])
Gone = Callable[[Desk, Worker], None]


# A worker without a lease gets no step


@GONE
def test_by_a_message(desk: Desk, gone: Gone) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0), row(1)])
    gone(desk, worker)
    advance = desk.store.claim_and_finish(worker, NOTHING, claims=[step_id(run, 0), step_id(run, 1)])
    assert (advance.mine, advance.lapsed) == ([], True)
    assert desk.statuses(run) == {0: S.READY, 1: S.READY}
    assert not desk.store.claim_and_finish(desk.worker, NOTHING, claims=[step_id(run, 0)]).lapsed


@GONE
def test_in_place_after_a_step_that_it_may_finish(desk: Desk, gone: Gone) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0, 1, 2), row(1, deps=1), row(2, deps=1, weight=Weight.INLINE)])
    step = desk.one(run, 0, worker=worker)
    gone(desk, worker)
    advance = desk.end(step, worker=worker, keep=ClaimCapacity(9, 9, 9))
    assert (advance.mine, sorted(rows_of(advance.ready)), advance.refused) == ([], [1, 2], [])
    assert desk.statuses(run) == {0: S.SUCCEEDED, 1: S.READY, 2: S.READY}
    assert all(desk.step(run, number).due is not None for number in (1, 2)), "a lost message is noticed"


@GONE
def test_from_the_window_of_a_map(desk: Desk, gone: Gone) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0, weight=Weight.INLINE)])
    items = [row(number, parent=0, position=number, deps=0 if number < 1 else 1) for number in range(3)]
    made = desk.store.expand(desk.one(run, 0), items, phase="item", items=[1, 2, 3], window=1)
    assert isinstance(made, Children)
    step = desk.one(run, made.base, worker=worker)
    gone(desk, worker)
    advance = desk.end(step, worker=worker, keep=ClaimCapacity(9, 9, 9))
    assert (advance.mine, rows_of(advance.ready)) == ([], [made.base + 1])
    assert desk.status(run, made.base + 1) is S.READY


@GONE
def test_from_the_backlog(desk: Desk, gone: Gone) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0)])
    desk.store.enqueue([head for head, _ in desk.store.overdue(home="", all_ready=True)[0]], "team")
    gone(desk, worker)
    assert desk.store.claim_and_finish(worker, ClaimCapacity(9, 9, 9)).mine == []
    assert [entry.step_id for entry in desk.waiting()] == [step_id(run, 0)], "it waits for somebody else"


@GONE
def test_of_a_run_with_max_parallel(desk: Desk, gone: Gone) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0), row(1)], max_parallel=1)
    gone(desk, worker)
    admitted = desk.store.claim_limited(worker, run, [step_id(run, 0), step_id(run, 1)], free=9)
    assert (admitted.mine, rows_of(admitted.ready)) == ([], [0])
    assert rows_of(desk.store.claim_limited(desk.worker, run, [step_id(run, 0)], free=9).mine) == [0]


@GONE
def test_when_a_step_of_its_run_fails(desk: Desk, gone: Gone) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0, 1), row(1, deps=1, weight=Weight.INLINE)])
    step = desk.one(run, 0, worker=worker)
    gone(desk, worker)
    advance = desk.end(step, worker=worker, status=S.FAILED, keep=ClaimCapacity(9, 9, 9))
    assert (advance.mine, rows_of(advance.ready)) == ([], [1])


def test_a_heartbeat_makes_it_a_worker_again(desk: Desk) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0)])
    reap(desk, worker)
    assert desk.store.heartbeat(worker, 10, {}) is Renewal.REVIVED
    assert desk.one(run, 0, worker=worker)
    forget(desk, worker)
    assert desk.store.heartbeat(worker, 10, {}) is Renewal.UNKNOWN


# Recovery goes by the steps


def hold_anyway(desk: Desk, run: int, worker: Worker, gone: Gone) -> None:
    """A claim that was under way while its worker was given up."""
    desk.one(run, 0, worker=worker)
    gone(desk, worker)
    with desk.store.database.write() as connection:
        values = {"status": int(S.RUNNING), "owner": worker.owner, "token": steps.c.token + 1}
        connection.execute(update(steps).where(steps.c.id == step_id(run, 0)).values(values))


@GONE
def test_what_a_dead_worker_holds_comes_back_however_it_came_to_it(desk: Desk, gone: Gone) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0)])
    hold_anyway(desk, run, worker, gone)
    assert rows_of(desk.store.reap(home="").again) == [0]
    assert desk.status(run, 0) is S.READY


def test_a_quick_look_sees_the_workers_that_have_died_since(desk: Desk) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0)])
    hold_anyway(desk, run, worker, reap)
    assert desk.store.reap(home="", thorough=False).again == []
    other = desk.register(lease=10)
    later = desk.create([row(0)])
    desk.one(later, 0, worker=other)
    elapse(desk.store, 20)
    assert sorted(head.id for head in desk.store.reap(home="", thorough=False).again) == [
        step_id(run, 0),
        step_id(later, 0),
    ]


def test_a_process_never_takes_its_own_steps_back(desk: Desk) -> None:
    """It was suspended for longer than its lease, and sweeps before its next heartbeat."""
    worker = desk.register(lease=10)
    run = desk.create([row(0)])
    desk.one(run, 0, worker=worker)
    elapse(desk.store, 20)
    assert desk.store.reap(home="", sparing=worker.owner).again == []
    assert desk.status(run, 0) is S.RUNNING
    assert rows_of(desk.store.reap(home="").again) == [0], "another process does"


# Two answers never look alike


def test_a_lost_claim_is_not_a_stopped_run(desk: Desk) -> None:
    """The step is ready again with the same token: an end that is brought now would be taken for true."""
    worker = desk.register(lease=10)
    run = desk.create([row(0, weight=Weight.INLINE)])
    step = desk.one(run, 0, worker=worker)
    reap(desk, worker)
    assert desk.step(run, 0).token == step.token
    assert desk.store.expand(step, [row(0, parent=0)], phase="body") is Refusal.LOST
    parked = desk.store.park(step, Snoozed(seconds=1, reason="retry", message="", calls=(), attempt=True))
    assert parked is Refusal.LOST
    assert desk.store.release(step) is Refusal.LOST


# Who is to blame


def die(desk: Desk, run: int, *numbers: int, after: float = 0.0) -> None:
    """A worker claims steps, runs them for so many seconds, and dies."""
    worker = desk.register(lease=10)
    ids = [step_id(run, number) for number in numbers]
    for suspects in (False, True):
        ready = [key for key in ids if desk.status(run, key & 0xFFFFF) is S.READY]
        if ready:
            desk.store.claim_and_finish(worker, NOTHING, claims=ready, suspects=suspects)
    if after:
        elapse(desk.store, after)
        desk.store.heartbeat(worker, 10, {})
    elapse(desk.store, 11)
    desk.store.reap(home="", thorough=False)


def crashes(desk: Desk, run: int) -> list[int]:
    return [int(desk.step(run, number).crashes) for number in desk.statuses(run)]


def test_all_that_the_dead_held_are_blamed_until_there_are_suspects(desk: Desk) -> None:
    run = desk.create([row(0), row(1)])
    die(desk, run, 0, 1)
    assert crashes(desk, run) == [1, 1]
    die(desk, run, 1)
    assert crashes(desk, run) == [1, 2]
    die(desk, run, 0, 1)
    assert crashes(desk, run) == [1, 3], "only the suspect is blamed"


def test_suspects_are_claimed_one_at_a_time_and_told_apart(desk: Desk) -> None:
    run = desk.create([row(0), row(1)])
    for _ in range(2):
        die(desk, run, 1)
    advance = desk.store.claim_and_finish(
        desk.worker, NOTHING, claims=[step_id(run, 0), step_id(run, 1), step_id(run, 7)]
    )
    assert (rows_of(advance.mine), advance.suspects) == ([0], [step_id(run, 1)])


def test_where_workers_die_all_the_time_nobody_is_condemned_for_three_deaths(desk: Desk) -> None:
    run = desk.create([row(0), row(1)])
    for _ in range(5):
        die(desk, run, 1)
        for _ in range(4):  # machines that are taken away, whatever they run
            desk.register(lease=1)
            elapse(desk.store, 2)
    assert crashes(desk, run) == [0, poison.SUSPECT_DEATHS]


def test_deaths_are_forgotten(desk: Desk) -> None:
    run = desk.create([row(0)])
    for _ in range(5):
        die(desk, run, 0)
        elapse(desk.store, poison.MEMORY_SECONDS / 2)
    assert crashes(desk, run) == [2]


def test_a_worker_that_has_ended_by_itself_did_not_die(desk: Desk) -> None:
    worker = desk.register(lease=10)
    run = desk.create([row(0)])
    desk.one(run, 0, worker=worker)
    desk.store.retire(worker)
    assert rows_of(desk.store.reap(home="").again) == [0]
    assert crashes(desk, run) == [0]
    assert desk.all(step_deaths) == []


def test_what_breaks_in_the_worker_is_the_steps_doing(desk: Desk) -> None:
    run = desk.create([row(0)])
    for count in (1, 2, 3):
        (step,) = desk.claim(run, 0, suspects=True)
        answer = desk.store.release(step, crashed="RecursionError()")
        assert isinstance(answer, Released)
        assert answer.head.crashes == count
    assert {entry.why for entry in desk.all(step_deaths)} == {"RecursionError()"}


def test_the_limit_can_be_set(stores: tuple[Store, Store]) -> None:
    desk = Desk(stores[0], lease=1e6)
    desk.store.poison_deaths = 5
    run = desk.create([row(0)])
    found = []
    for _ in range(5):
        die(desk, run, 0)
        found += crashes(desk, run)
    assert found == [1, 2, 3, 4, 5]


# Calls that died with their worker


def ask(name: str, *after: int, **spec: Any) -> Any:
    return agent(name, *after, spec={"provider": "openai", "model": "gpt-test", "role": "builder", **spec})


def called(desk: Desk) -> list[tuple[Any, ...]]:
    columns = ("token", "ordinal", "provider", "model", "role", "outcome", "cost_micro")
    found = sorted(desk.spent(), key=lambda entry: (entry.step_id, entry.token, entry.ordinal))
    return [tuple(getattr(entry, name) for name in columns) for entry in found]


LOST = ("openai", "gpt-test", "builder", "unknown", None)


def test_a_call_whose_worker_died_is_on_the_ledger(desk: Desk) -> None:
    run = make_run(desk.store, plan_of(ask("a"), node("b", kind=Kind.COMMAND, queue="command")))
    worker = desk.register(queues=[*range(9)], lease=10)
    assert len(desk.claim(run, 0, 1, worker=worker)) == 2
    elapse(desk.store, 20)
    desk.store.reap(home="")
    assert called(desk) == [(1, 1, *LOST)]
    assert desk.spent()[0].step_id == step_id(run, 0)


def test_what_was_stored_of_a_conversation_is_not_lost(desk: Desk) -> None:
    run = make_run(desk.store, plan_of(ask("a", models=["anthropic:claude-test", "openai:gpt-test"])))
    worker = desk.register(lease=10)
    step = desk.one(run, 0, worker=worker)
    Budgets(desk.store.database).keep(step, [paid(1)], "{}")
    elapse(desk.store, 20)
    desk.store.reap(home="")
    assert [entry[:2] + entry[5:6] for entry in called(desk)] == [(1, 1, "ok"), (1, 2, "unknown")]
    assert called(desk)[1][2:4] == ("anthropic", "claude-test")


def test_a_late_finish_tells_what_became_of_the_call(desk: Desk) -> None:
    run = make_run(desk.store, plan_of(ask("a")))
    worker = desk.register(lease=10)
    step = desk.one(run, 0, worker=worker)
    elapse(desk.store, 20)
    desk.store.reap(home="")
    desk.one(run, 0)
    assert desk.end(step, worker=worker, calls=(paid(1),)).refused
    assert called(desk) == [(1, 1, "openai", "gpt-test", "builder", "ok", 42)]
    desk.end(step, worker=worker, calls=(paid(1, cost_micro=7),))
    assert called(desk)[0][-1] == 42, "what is known stays"


def test_a_run_whose_process_died_keeps_its_calls(desk: Desk) -> None:
    run = make_run(desk.store, plan_of(ask("a")), home="laptop")
    desk.one(run, 0, worker=desk.register(home="laptop", lease=10, queues=[OPENAI]))
    elapse(desk.store, 20)
    assert desk.store.close_orphan(run)
    assert called(desk) == [(1, 1, *LOST)]
