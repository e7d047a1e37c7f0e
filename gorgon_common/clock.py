"""The clock, and the text form of times.

A time is an aware `datetime` in UTC.  In text it is RFC 3339 with microseconds and `Z`.  Leases and limits use the
clock of the database or Redis instead, because the clocks of two machines differ.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time; tests pass one that they advance by hand."""

    def now(self) -> datetime:
        """Return the time of day: aware, UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds since some fixed moment, never decreasing, to measure durations."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """Return the time of day: aware, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return seconds since some fixed moment, never decreasing, to measure durations."""
        return time.monotonic()


SYSTEM_CLOCK = SystemClock()


def format_time(moment: datetime) -> str:
    """Write an aware time as `2026-11-22T09:30:00.000000Z`.  Raises ValueError for a naive one."""
    if moment.tzinfo is None:
        raise ValueError(f"a time without a timezone cannot be written: {moment!r}")
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """Parse an RFC 3339 time (any offset, any precision up to microseconds) as UTC.

    Raises ValueError for anything else, including a time without an offset.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"not an RFC 3339 time (it has no offset): {text!r}")
    return moment.astimezone(UTC)
