"""A thread that wakes waiting steps when they are due; steps that are due at the same moment are woken together."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable


class Timer:
    """Calls `ring` with the keys that are due.  Best effort: the sweep wakes any step that the alarm misses."""

    def __init__(self, ring: Callable[[list[int]], None], *, clock: Callable[[], float] = time.monotonic) -> None:
        self._ring = ring
        self._clock = clock
        self._changed = threading.Condition()
        self._times: list[tuple[float, int]] = []
        self._thread: threading.Thread | None = None
        self._closed = False

    def set(self, seconds: float, key: int) -> None:
        """Ring for `key` in this many seconds."""
        with self._changed:
            heapq.heappush(self._times, (self._clock() + seconds, key))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="gorgon-alarm", daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Stop ringing."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while due := self._wait():
            self._ring(due)

    def _wait(self) -> list[int]:
        """Block until keys are due and return them; an empty list once the alarm is closed."""
        with self._changed:
            while not self._closed:
                now = self._clock()
                due = []
                while self._times and self._times[0][0] <= now:
                    due.append(heapq.heappop(self._times)[1])
                if due:
                    return due
                self._changed.wait(self._times[0][0] - now if self._times else None)
        return []
