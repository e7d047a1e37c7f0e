"""The heartbeat: often while the worker has work, seldom while it has none; what an idle minute costs the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import event

from gorgon_common.engine.poison import BEAT_SECONDS
from gorgon_common.engine.records import ClaimCapacity, step_id
from gorgon_common.engine.states import RunStatus
from gorgon_common.errors import Unavailable
from gorgon_worker.heartbeat import Heartbeat
from tests.support.engine import agent, plan_of
from tests.support.fleet import Fleet, Process, fleet
from tests.support.running import eventually

LEASE = 30.0
WORKERS = 3


class Hands:
    """A clock that a test moves, for processes and for the database alike."""

    def __init__(self, made: Fleet) -> None:
        self.made = made
        self.now = made.store.database.now().timestamp()

    def __call__(self) -> float:
        return self.now

    def move(self, seconds: float) -> None:
        self.now += seconds
        self.made.elapse(seconds)


@pytest.fixture
def made(sqlite_url: str) -> Iterator[Fleet]:
    with fleet(sqlite_url, WORKERS, lease=LEASE) as found:
        yield found


@pytest.fixture
def clock(made: Fleet) -> Hands:
    hands = Hands(made)
    for process in made.processes:
        process.sweep._clock = hands
    return hands


def beating(process: Process, clock: Callable[[], float]) -> Heartbeat:
    heartbeat = Heartbeat(process.store, process.member, process.machine, LEASE, lambda: None, clock=clock)
    process.machine.worked = heartbeat.worked
    process.machine.renew = heartbeat.renew
    process.sweep.renew = heartbeat.renew_if_late
    return heartbeat


def test_it_beats_often_while_a_step_is_held(made: Fleet, clock: Hands) -> None:
    process = made.processes[0]
    heartbeat = beating(process, clock)
    assert heartbeat.beat() == LEASE / 3
    run = process.submit(plan_of(agent("a", spec={"provider": "openai", "prompt": "a"})))
    (step,) = process.store.claim_and_finish(process.member, ClaimCapacity(0, 0, 0), claims=[step_id(run, 0)]).mine
    process.machine.held[step.id] = step
    assert heartbeat.beat() == BEAT_SECONDS
    del process.machine.held[step.id]
    assert heartbeat.beat() == LEASE / 3


def test_what_was_served_is_told_soon(made: Fleet, clock: Hands) -> None:
    """The sweep takes it as a proof that earlier messages are lost."""
    process = made.processes[0]
    heartbeat = beating(process, clock)
    heartbeat.mark(0, 5.0)
    assert heartbeat.beat() == LEASE / 3
    assert process.store.watermarks(home="") == {0: 5.0}


def test_it_beats_often_after_a_beat_that_failed(made: Fleet, clock: Hands, monkeypatch: pytest.MonkeyPatch) -> None:
    process = made.processes[0]
    heartbeat = beating(process, clock)

    def away(*_: object) -> None:
        raise Unavailable("The database cannot be used.")

    with monkeypatch.context() as patch:
        patch.setattr(process.store, "heartbeat", away)
        assert heartbeat.beat() == BEAT_SECONDS
    assert heartbeat.beat() == LEASE / 3


def test_a_doubt_is_looked_into_often(made: Fleet, clock: Hands) -> None:
    heartbeat = beating(made.processes[0], clock)
    made.processes[0].machine.doubts = 2
    assert [heartbeat.beat() for _ in range(3)] == [BEAT_SECONDS, LEASE / 3, LEASE / 3]


def test_only_a_late_lease_is_renewed_by_the_sweep(made: Fleet, clock: Hands) -> None:
    process = made.processes[0]
    heartbeat = beating(process, clock)
    clock.move(heartbeat.beat() - 1)
    before = heartbeat._renewed
    heartbeat.renew_if_late()
    assert heartbeat._renewed == before
    clock.move(2)
    heartbeat.renew_if_late()
    assert heartbeat._renewed == clock.now


def test_a_claim_ends_a_long_pause(made: Fleet) -> None:
    """Or a step could run for ten seconds on a worker that nobody has heard of since."""
    process = made.processes[0]
    beats = []
    heartbeat = Heartbeat(process.store, process.member, process.machine, 1e6, lambda: None, often=0.01)
    process.machine.worked = heartbeat.worked
    whole = heartbeat.beat

    def counted() -> float:
        beats.append(whole())
        return beats[-1]

    heartbeat.beat = counted  # type: ignore[method-assign]
    heartbeat.start()
    try:
        eventually(lambda: beats == [1e6 / 3], within=30, what="the first beat")
        run = process.submit(plan_of(agent("a", spec={"provider": "openai", "prompt": "a"})))
        made.drain()
        assert made.status(run) is RunStatus.SUCCEEDED
        eventually(lambda: len(beats) > 1, within=30, what="the second beat")
    finally:
        heartbeat.stop()
    assert not heartbeat._thread.is_alive()


def test_an_idle_minute_takes_few_statements(made: Fleet, clock: Hands) -> None:
    """Three workers that have nothing to do: their heartbeats and their sweeps, as often as these say themselves."""
    asked: list[str] = []
    for process in made.processes:

        @event.listens_for(process.store.database.engine, "before_cursor_execute")
        def count(connection: object, cursor: object, statement: str, *_: object) -> None:
            if not statement.startswith("BEGIN"):
                asked.append(statement)

    actors = [look for process in made.processes for look in (beating(process, clock).beat, process.sweep.look)]
    due = dict.fromkeys(range(len(actors)), clock.now)
    minute = 60.0
    for _ in range(2):  # the first one settles who leads
        asked.clear()
        until = clock.now + minute
        while min(due.values()) < until:
            number = min(due, key=lambda key: due[key])
            clock.move(max(0.0, due[number] - clock.now))
            due[number] = clock.now + actors[number]()
        clock.move(until - clock.now)
    beats = sum("UPDATE workers" in statement for statement in asked)
    assert beats == WORKERS * minute / (LEASE / 3)
    assert len(asked) < 100, Counter(statement[:40] for statement in asked)
