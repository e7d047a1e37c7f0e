"""What a process logs of a database that cannot be used, and when it gives up."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from gorgon_common import logs
from gorgon_common.engine.outage import FAULT_SECONDS, LOG_SECONDS, Outage
from gorgon_common.errors import ConfigurationError, StorageFault, Unavailable

FULL = StorageFault("The disk of the database server is full.")
AWAY = Unavailable("The connection to the database broke.")


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def logged() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    logs.configure("warning", stream=stream)
    yield stream
    logs.configure()


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_the_same_thing_is_logged_once_a_minute(clock: Clock, logged: io.StringIO) -> None:
    outage = Outage(clock=clock)
    for _ in range(100):
        outage.failed(FULL)
        outage.failed(FULL, "the heartbeat failed")
        outage.passed()  # a small row still finds room
        clock.now += 0.5
    lines = logged.getvalue().splitlines()
    assert len([line for line in lines if "is full" in line]) == 1
    assert len(lines) == 2, "and once that it passed"
    outage.failed(AWAY)
    assert "broke" in logged.getvalue(), "another fault is another line"
    clock.now += LOG_SECONDS
    outage.failed(FULL)
    assert logged.getvalue().count("is full") == 2


def test_a_server_waits_for_ever(clock: Clock) -> None:
    outage = Outage(clock=clock)
    for error in (FULL, ConfigurationError("It is damaged.")):
        outage.failed(error)
        clock.now += 100 * FAULT_SECONDS
        outage.failed(error)
    assert outage.final is None


def test_a_run_of_this_process_gives_up_where_the_fault_lasts(clock: Clock) -> None:
    outage = Outage(leaves=True, clock=clock)
    outage.failed(AWAY)
    clock.now += 100 * FAULT_SECONDS
    outage.failed(AWAY)
    outage.failed(FULL)
    assert outage.final is None, "a connection may come back, and the file has only begun to fail"
    clock.now += FAULT_SECONDS
    outage.failed(FULL)
    assert outage.final is FULL


def test_one_commit_that_fails_for_long_is_enough(clock: Clock) -> None:
    outage = Outage(leaves=True, clock=clock)
    since = outage.failed(FULL)
    clock.now += FAULT_SECONDS
    outage.passed()
    outage.failed(FULL, since=since)
    assert outage.final is FULL


def test_a_damaged_file_is_not_waited_for(clock: Clock) -> None:
    outage = Outage(leaves=True, clock=clock)
    outage.failed(damaged := ConfigurationError("The database x is damaged."))
    assert outage.final is damaged
