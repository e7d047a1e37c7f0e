"""Ids grow; times are written and read one way."""

from __future__ import annotations

import os
import threading
from datetime import UTC, datetime, timedelta, timezone

import pytest

from gorgon_common.clock import SYSTEM_CLOCK, format_time, parse_time
from gorgon_common.ids import Ids, is_id, new_id


class Milliseconds:
    """A clock moved by hand."""

    now = 1_700_000_000_000

    def __call__(self) -> int:
        return self.now


def test_an_id_is_prefix_and_ulid() -> None:
    # the example of the ULID specification's time part: 1469918176385 is 01ARYZ6S41
    ids = Ids(milliseconds=lambda: 1469918176385, randomness=lambda size: b"\xff" * size)
    assert ids.new("run") == "run_01ARYZ6S41" + "FZZZZZZZZZZZZZZZ"
    assert is_id(new_id("run"), "run")


def test_ids_grow_in_one_millisecond_and_when_the_clock_goes_back() -> None:
    clock = Milliseconds()
    ids = Ids(milliseconds=clock, randomness=lambda size: b"\xff" * size)
    made = [ids.new("run") for _ in range(40)]
    clock.now -= 5_000
    made += [ids.new("run") for _ in range(40)]
    clock.now += 10_000
    made.append(ids.new("run"))
    assert made == sorted(set(made))


def test_ids_of_many_threads_are_distinct() -> None:
    ids = Ids(milliseconds=Milliseconds())
    made: list[str] = []

    def work() -> None:
        made.extend([ids.new("x") for _ in range(500)])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 2000


def test_a_forgotten_past_is_not_counted_up() -> None:
    ids = Ids(milliseconds=Milliseconds(), randomness=os.urandom)
    before = ids.new("x")
    ids.forget()  # what a forked child does
    assert ids.new("x")[:12] == before[:12]
    assert abs(int(ids.new("x")[-6:], 36) - int(before[-6:], 36)) > 2


@pytest.mark.parametrize(
    "text", ["", "run", "run_", "job_01ARYZ6S41FZZZZZZZZZZZZZZZ", "run_01aryz6s41fzzzzzzzzzzzzzzz"]
)
def test_what_is_no_id(text: str) -> None:
    assert not is_id(text, "run")


def test_times_are_written_with_microseconds_and_z() -> None:
    moment = datetime(2026, 3, 1, 1, 2, 3, tzinfo=timezone(timedelta(hours=2)))
    assert format_time(moment) == "2026-02-28T23:02:03.000000Z"
    with pytest.raises(ValueError, match="without a timezone"):
        format_time(datetime(2026, 1, 1))  # noqa: DTZ001


@pytest.mark.parametrize(
    "text",
    ["2026-02-28T23:02:03.000000Z", "2026-02-28T23:02:03Z", "2026-03-01T01:02:03+02:00", "2026-02-28T23:02:03.000Z"],
)
def test_times_are_read_with_any_offset(text: str) -> None:
    assert parse_time(text) == datetime(2026, 2, 28, 23, 2, 3, tzinfo=UTC)


@pytest.mark.parametrize("text", ["2026-02-28T23:02:03", "2026-02-28", "yesterday"])
def test_what_is_no_time(text: str) -> None:
    with pytest.raises(ValueError, match=r"offset|isoformat"):
        parse_time(text)


def test_the_system_clock() -> None:
    assert SYSTEM_CLOCK.now().tzinfo is UTC
    assert SYSTEM_CLOCK.monotonic() <= SYSTEM_CLOCK.monotonic()
    assert parse_time(format_time(SYSTEM_CLOCK.now())) <= SYSTEM_CLOCK.now()
