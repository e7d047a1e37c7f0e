"""Steps that run one after another: when they may, and what becomes of those behind one that takes long."""

from __future__ import annotations

import queue
from collections.abc import Sequence

from gorgon_common.engine.records import Claimed, step_id
from gorgon_common.engine.short_steps import BusyShare, LateSteps, Line


def test_nothing_is_known_before_the_first_measurement() -> None:
    assert not BusyShare().high


def test_steps_that_compute_are_told_from_steps_that_wait() -> None:
    share = BusyShare()
    for _ in range(20):
        share.measured(0.001, 0.0009, 1)
    assert share.high
    for _ in range(20):
        share.measured(0.001, 0.0001, 1)
    assert not share.high


def test_steps_that_take_turns_on_the_processor_count_as_computing() -> None:
    """Each of four takes four times as long as it computes, because the others compute as well."""
    share = BusyShare()
    for _ in range(20):
        share.measured(0.004, 0.001, 4)
    assert share.high


def steps(count: int) -> list[Claimed]:
    return [Claimed(step_id(1, row), 1, row, 2, 0, 1, None, None, 0) for row in range(count)]


def test_a_line_gives_each_step_once() -> None:
    first, second, third = steps(3)
    line = Line([first, second, third])
    assert line.next() is first
    assert line.rest() == [second, third]
    assert line.next() is None
    assert line.rest() == []


def test_what_waits_behind_a_long_step_is_handed_over_while_it_runs() -> None:
    handed: queue.Queue[Sequence[Claimed]] = queue.Queue()
    late = LateSteps()
    first, *others = steps(3)
    line = Line([first, *others])
    try:
        with late.watching(line, handed.put):
            assert line.next() is first  # and it does not end
            assert handed.get(timeout=10) == others
            assert line.next() is None
        again = Line(steps(2))
        with late.watching(again, handed.put):  # the thread serves the next line as well
            again.next()
            assert len(handed.get(timeout=10)) == 1
    finally:
        late.close()
    assert handed.empty()


def test_a_line_without_steps_behind_is_never_late() -> None:
    line = Line(steps(1))
    line.next()
    assert not line.late()
