"""Places to sleep for calls that wait briefly for the limiter."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator


class SleepSlots:
    """Limits how many calls may sleep in their slots, because too many sleepers would keep others from starting.
    Thread-safe.

    At most `most` per team, and `most` + `spare` in total, so that a busy team leaves room for a quiet one.
    """

    def __init__(self, most: int, spare: int = 0) -> None:
        self._most = most
        self._all = most + spare
        self._teams: dict[str, int] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self, team: str) -> Iterator[bool]:
        """Reserve a place to sleep until the end of the block; yields whether there is one."""
        with self._lock:
            mine = self._teams.get(team, 0)
            free = mine < self._most and sum(self._teams.values()) < self._all
            if free:
                self._teams[team] = mine + 1
        try:
            yield free
        finally:
            if free:
                with self._lock:
                    self._teams[team] -= 1
