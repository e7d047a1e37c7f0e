"""Who is asked for the time, and how a time is written.

A time is an aware `datetime` in UTC; written, it is RFC 3339 with microseconds and `Z`.  Leases and limits do not use
this clock but the database's or Redis' (the clocks of two machines differ).
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time; tests pass one that they move by hand."""

    def now(self) -> datetime:
        """Return the time of day: aware, UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds since some fixed moment, never going back: for durations."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """Return the time of day: aware, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Return seconds since some fixed moment, never going back: for durations."""
        return time.monotonic()


SYSTEM_CLOCK = SystemClock()


def format_time(moment: datetime) -> str:
    """Write an aware time as `2026-11-22T09:30:00.000000Z`.  Raises ValueError for a naive one."""
    if moment.tzinfo is None:
        raise ValueError(f"a time without a timezone cannot be written: {moment!r}")
    return moment.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def parse_time(text: str) -> datetime:
    """Read an RFC 3339 time (any offset, any precision up to microseconds) as UTC.

    Raises ValueError for anything else, a time without an offset included.
    """
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        raise ValueError(f"not an RFC 3339 time (it has no offset): {text!r}")
    return moment.astimezone(UTC)
