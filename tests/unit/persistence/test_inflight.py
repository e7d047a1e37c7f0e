"""Calls that no budget counts, while a budget may come."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

from gorgon_common.engine.records import RunInfo
from gorgon_common.errors import Unavailable
from gorgon_common.persistence.untracked_calls import Call, InFlight
from tests.support.running import eventually

INFO = RunInfo(1, "run", 1, "blue", "w", "", {}, "live", "", 1, datetime(2026, 1, 2, tzinfo=UTC))


def call(number: int) -> Call:
    return Call((1, 1, number), INFO, lambda: (10, 5, 3))


def test_a_call_is_held_when_a_budget_counts_it_and_says_so_when_it_is_over() -> None:
    counted = False
    calls = InFlight(lambda _: counted)
    first, second = call(1), call(2)
    calls.note(first)
    calls.look()
    assert not calls.over(first.key)
    calls.note(second)
    counted = True
    calls.look()
    assert calls.over(second.key)
    assert not calls.over(second.key)
    calls.close()


def test_the_thread_looks_while_there_are_calls_and_goes_on_after_an_outage() -> None:
    asked: list[Call] = []

    def hold(one: Call) -> bool:
        asked.append(one)
        if len(asked) == 1:
            raise Unavailable("The database is away.")
        return True

    calls = InFlight(hold)
    one = call(1)
    calls.note(one)
    eventually(lambda: one.held, what="the hold")
    assert calls.over(one.key)
    assert len(calls) == 0
    calls.close()


def test_a_call_that_ends_while_it_is_reserved_for_waits_for_that_and_no_other_does() -> None:
    begun, release = threading.Event(), threading.Event()

    def hold(_: Call) -> bool:
        begun.set()
        return release.wait(10)

    calls = InFlight(hold)
    slow, other = call(1), call(2)
    calls.note(slow)
    with ThreadPoolExecutor(2) as pool:
        looking = pool.submit(calls.look)
        assert begun.wait(10)
        calls.note(other)
        assert not calls.over(other.key)
        over = pool.submit(calls.over, slow.key)
        assert not over.done()
        release.set()
        assert over.result(10)
        looking.result(10)
    calls.close()
