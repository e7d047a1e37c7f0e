"""`wait:` in its three forms, on a real store whose clock the tests move."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from gorgon_common.clock import SystemClock, format_time
from gorgon_common.engine.records import step_id
from gorgon_common.engine.states import RunStatus, StepStatus
from gorgon_common.errors import Conflict
from gorgon_common.workflow.plan import Kind, Node, OnFailure, Plan, Ref
from tests.support.engine import agent, elapse, node, plan_of
from tests.support.fleet import Fleet, fleet

S = StepStatus


class Moved(SystemClock):
    """The worker's clock, as far ahead as the database's."""

    ahead = timedelta()

    def now(self) -> datetime:
        return super().now() + self.ahead


class Hall:
    """Runs a plan whose first step waits."""

    def __init__(self, made: Fleet) -> None:
        self.made = made
        self.clock = Moved()
        self.process = made.processes[0]
        object.__setattr__(self.process.machine.executor.services, "clock", self.clock)

    def start(self, plan: Plan) -> None:
        self.number = self.process.submit(plan, {})
        self.made.drain()

    def later(self, seconds: float) -> None:
        self.clock.ahead += timedelta(seconds=seconds)
        elapse(self.made.store, seconds)
        self.process.sweep.once()
        self.made.drain()

    def send(self, name: str, data: Any = None) -> None:
        self.process.publisher.publish(self.made.store.send_event(self.number, name, data))
        self.made.drain()

    def state(self, row: int = 0) -> StepStatus:
        return self.made.statuses(self.number)[row]

    def end(self, row: int = 0) -> Any:
        key = step_id(self.number, row)
        return self.made.store.checkpoints([key])[key]

    @property
    def status(self) -> RunStatus:
        return self.made.status(self.number)


@pytest.fixture
def hall(sqlite_url: str) -> Iterator[Hall]:
    with fleet(sqlite_url) as made:
        yield Hall(made)


def waits(*after: int, **spec: Any) -> Node:
    return node("pause", *after, kind=Kind.WAIT, spec=spec)


def test_a_duration_counts_from_the_step_before_and_holds_nothing(hall: Hall) -> None:
    spec = {"provider": "openai", "model": "m", "prompt": "go"}
    hall.start(plan_of(agent("before", spec=spec), waits(0, **{"for": 600.0}), agent("after", 1, spec=spec)))
    assert (hall.state(1), hall.state(2)) == (S.WAITING, S.PENDING)
    machine = hall.process.machine
    assert not machine.held
    assert machine._running == 0
    hall.later(590)
    assert hall.state(1) is S.WAITING
    hall.later(11)
    assert hall.status is RunStatus.SUCCEEDED
    assert hall.end(1).output is None


def test_a_point_in_time_that_has_passed_is_no_wait(hall: Hall) -> None:
    hall.start(plan_of(waits(until="2020-01-01T00:00:00Z")))
    assert hall.status is RunStatus.SUCCEEDED


def test_a_point_in_time(hall: Hall) -> None:
    hall.start(plan_of(waits(until=format_time(datetime.now(UTC) + timedelta(seconds=3600)))))
    hall.later(3500)
    assert hall.state() is S.WAITING
    hall.later(120)
    assert hall.status is RunStatus.SUCCEEDED


def test_what_is_no_point_in_time_fails_the_step_and_says_how_it_is_written(hall: Hall) -> None:
    hall.start(plan_of(waits(until="tomorrow")))
    assert hall.status is RunStatus.FAILED
    error = hall.end().error
    assert error["message"] == "`until:` of `pause` gives 'tomorrow', which is not a point in time."
    assert "2026-05-01T06:00:00Z" in error["hint"]


def test_an_event_lets_the_step_go_on_with_its_data(hall: Hall) -> None:
    spec = {"provider": "openai", "model": "m", "prompt": "{{pause}}"}
    hall.start(plan_of(waits(event="deployed"), agent("after", 0, spec=spec, refs={"pause": Ref("step", node=0)})))
    assert hall.state() is S.WAITING
    hall.send("other", 1)
    assert hall.state() is S.WAITING
    hall.send("deployed", "version 7")
    assert hall.status is RunStatus.SUCCEEDED
    assert (hall.end(0).output, hall.end(0).detail["event"]) == ("version 7", "deployed")
    assert hall.end(1).output == "version 7"


def test_an_event_that_comes_before_the_wait_is_kept_and_taken_once(hall: Hall) -> None:
    first = node("first", kind=Kind.WAIT, spec={"event": "go"})
    second = node("second", 0, kind=Kind.WAIT, spec={"event": "go"})
    hall.number = hall.process.submit(plan_of(first, second), {})
    hall.made.store.send_event(hall.number, "go", {"n": 1})
    hall.made.drain()
    assert (hall.state(0), hall.state(1)) == (S.SUCCEEDED, S.WAITING)
    hall.send("go", {"n": 2})
    assert hall.status is RunStatus.SUCCEEDED
    assert [hall.end(row).output for row in (0, 1)] == [{"n": 1}, {"n": 2}]


def test_an_event_that_does_not_come_fails_the_step_or_does_as_it_says(hall: Hall) -> None:
    spec = {"event": "deployed", "timeout": 60.0}
    hall.start(plan_of(Node("pause", Kind.WAIT, spec=spec, on_failure=OnFailure("default", value=0))))
    hall.later(61)
    assert hall.status is RunStatus.SUCCEEDED
    assert hall.end().output == 0
    hall.start(plan_of(waits(**spec)))
    hall.later(61)
    assert hall.status is RunStatus.FAILED
    assert hall.end().error["kind"] == "timeout"
    assert "gorgon runs signal run_" in hall.end().error["hint"]


def test_a_run_that_has_ended_takes_no_event(hall: Hall) -> None:
    hall.start(plan_of(waits(until="2020-01-01T00:00:00Z")))
    with pytest.raises(Conflict, match="already succeeded"):
        hall.made.store.send_event(hall.number, "late", None)


def test_a_wait_ends_with_its_run(hall: Hall) -> None:
    hall.start(plan_of(waits(event="never")))
    run = hall.process.knowledge.run(hall.number)
    heads = hall.made.store.stop(hall.number, gate=run.gate, keeps=run.keeps, error=None, reason="cancelled")
    hall.process.publisher.publish(heads)
    hall.made.drain()
    assert hall.status is RunStatus.CANCELLED
