"""Publishing: what goes to the broker, what stays in the database, and what a canvas carries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gorgon_common.engine import publish
from gorgon_common.engine.records import ReadyStep, Weight, step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.persistence.tables import steps
from gorgon_common.workflow.plan import Kind
from tests.support.engine import NOTHING, Desk, agent, elapse, node, plan_of
from tests.support.fleet import Fleet, Post, Process, fleet

S = StepStatus
ROOM = publish.LEAST_ROOM


def spec() -> dict[str, Any]:
    return {"provider": "openai", "model": "gpt-test", "prompt": "go"}


def step(name: str, *after: int, **fields: Any) -> Any:
    return agent(name, *after, **{"spec": spec(), **fields})


@pytest.fixture
def made(sqlite_url: str) -> Iterator[Fleet]:
    with fleet(sqlite_url) as found:
        yield found


@pytest.fixture
def here(made: Fleet) -> Process:
    return made.processes[0]


def sent(made: Fleet) -> list[int]:
    return [key & 0xFFFFF for post in made.mailbox.waiting for key in post.ids]


def shelved(made: Fleet) -> int:
    return sum(made.store.shelved().values())


def test_a_queue_is_given_what_it_has_room_for_and_the_rest_stays_in_the_database(made: Fleet, here: Process) -> None:
    here.submit(plan_of(*[step(f"s{number}") for number in range(ROOM + 36)]))
    assert sent(made) == list(range(ROOM))
    assert shelved(made) == 36
    with made.store.database.read() as connection:
        waiting = connection.execute(steps.select().where(steps.c.due.is_(None), steps.c.status == 1)).all()
    assert len(waiting) == 36  # never overdue: nobody has lost a message of theirs


def test_many_small_runs_fill_a_queue_no_further_than_a_large_one(made: Fleet, here: Process) -> None:
    """Redis holds a bounded number of messages, however the steps come."""
    for _ in range(ROOM + 10):
        made.mailbox._depths.clear()
        here.submit(plan_of(step("only")))
    assert len(made.mailbox.waiting) == ROOM
    assert shelved(made) == 10


def test_room_grows_with_the_living_slots(sqlite_url: str) -> None:
    with fleet(sqlite_url, slots=ROOM * 3) as made:
        here = made.processes[0]
        room = publish.AHEAD * ROOM * 3
        here.submit(plan_of(*[step(f"s{number}") for number in range(room + 5)]))
        assert (len(sent(made)), shelved(made)) == (room, 5)


def test_each_queue_has_room_of_its_own(made: Fleet, here: Process) -> None:
    here.submit(plan_of(*[step(f"a{number}") for number in range(ROOM + 5)]))
    here.submit(plan_of(step("b", queue="anthropic")))
    assert made.mailbox.waiting[-1].queue == "anthropic"


def test_a_quiet_team_does_not_wait_behind_a_noisy_one(made: Fleet, here: Process) -> None:
    made.mailbox.waiting += [Post([1], "openai", "gorgon.agent")] * ROOM
    here.submit(plan_of(*[step(f"s{number}") for number in range(500)]), team="noisy")
    quiet = here.submit(plan_of(step("s")), team="quiet")
    made.mailbox.waiting.clear()
    here.publisher.refill()
    places = [key >> 20 for post in made.mailbox.waiting for key in post.ids]
    assert (len(places), places.count(quiet)) == (publish.REFILL, 1)


def test_what_was_recovered_goes_out_whatever_the_room(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(*[step(f"s{number}") for number in range(ROOM)], step("late")))
    heads = [ReadyStep(step_id(run, ROOM), ROOM, Weight.SLOW, 0)]
    here.publisher.publish(heads, recovered=True)
    assert sent(made)[-1] == ROOM


def test_refilling_sends_what_there_is_room_for_now(made: Fleet, here: Process) -> None:
    here.submit(plan_of(*[step(f"s{number}") for number in range(ROOM + 30)]))
    here.publisher.refill()
    assert (len(sent(made)), shelved(made)) == (ROOM + publish.REFILL, 30 - publish.REFILL)
    made.mailbox.waiting += [Post([1], "openai", "gorgon.agent")] * ROOM
    here.publisher.refill()
    assert shelved(made) == 30 - publish.REFILL


def test_a_broker_that_is_away_loses_nothing(made: Fleet, here: Process) -> None:
    made.mailbox.away = True
    run = here.submit(plan_of(step("a"), node("b"), step("c", 0, 1)))
    assert made.mailbox.waiting == []
    here.publisher.refill()
    made.mailbox.away = False
    elapse(made.store, 6)
    here.sweep.once()
    for _ in range(3):
        made.drain()
        elapse(made.store, 6)
        here.sweep.once()
    assert made.status(run) is RunStatus.SUCCEEDED


def test_a_fan_in_is_one_message_and_is_never_taken_over(made: Fleet, here: Process) -> None:
    """What a chord will send, the chord sends: seen as a fan-in, and not twice."""
    run = here.submit(plan_of(step("a"), step("b", 0), step("c", 0), step("d", 1, 2)))
    made.drain()
    assert made.status(run) is RunStatus.SUCCEEDED
    by_step = [key & 0xFFFFF for post in made.mailbox.published for key in post.ids]
    assert sorted(by_step) == [0, 1, 2, 3]
    assert sorted(made.provider.calls) == ["a", "b", "c", "d"]


def test_a_chord_without_room_for_all_of_it_is_no_chord(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(*[step(f"s{number}") for number in range(ROOM + 8)], step("join", *range(ROOM + 8))))
    assert not Desk(made.store).step(run, ROOM + 8).carried
    for _ in range(4):
        made.drain()
        here.publisher.refill()
    made.drain()
    assert made.status(run) is RunStatus.SUCCEEDED
    assert made.provider.calls.count("join") == 1


def test_a_step_that_waits_takes_the_join_off_its_canvas(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(step("a"), step("b"), step("c", 0, 1)))
    desk = Desk(made.store)
    assert desk.step(run, 2).carried
    (held,) = made.store.claim_and_finish(here.member, NOTHING, claims=[step_id(run, 0)]).mine
    here.publisher.departed(held)
    assert not desk.step(run, 2).carried


def test_what_a_worker_gives_back_goes_to_the_front(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(*[step(f"s{number}") for number in range(ROOM + 4)]))
    here.publisher.give_back([step_id(run, 1)])
    seen = []
    here.publisher.shelved = lambda: seen.append(True)
    here.publisher.give_back([step_id(run, 2)])
    assert seen
    made.mailbox.waiting.clear()
    here.publisher.refill()
    assert sent(made)[:2] == [1, 2]


def test_what_is_not_ready_any_more_is_not_given_back(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(step("a")))
    made.drain()
    here.publisher.give_back([step_id(run, 0)])
    assert shelved(made) == 0


def test_steps_that_need_no_provider_are_run_here_without_a_message(made: Fleet, here: Process) -> None:
    run = here.submit(plan_of(node("a", kind=Kind.CHECKPOINT, spec={"message": "hello"})))
    made.idle()
    assert made.mailbox.published == []
    assert made.status(run) is RunStatus.SUCCEEDED


def test_where_nothing_is_run_they_are_sent(made: Fleet, here: Process) -> None:
    """As in the API, which has no machine."""
    here.publisher.here = None
    here.submit(plan_of(node("a", kind=Kind.CHECKPOINT, spec={"message": "hello"})))
    assert [(post.queue, post.task) for post in made.mailbox.waiting] == [("control", "gorgon.control")]
