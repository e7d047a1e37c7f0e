"""Ready steps that wait in a worker process for its next free slot, without a message and without a claim.

A message costs a worker more than a step whose provider answers at once, so where slots become free within
milliseconds, what has become ready here is offered to them.  Nobody has claimed these steps: another worker may take
them, a slot that finds one taken claims nothing, and the sweep sends those that a process takes to its grave.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence

from gorgon_common.engine.records import Head, Weight

SHORT_SECONDS = 0.005
"""Steps that take less free their slots soon enough to wait for."""
_SHARE = 0.1
"""Weight of the newest step in the moving average."""


class ReadyQueue:
    """At most `most` ready steps of a process; thread-safe.  Steps count as short below `short` seconds."""

    def __init__(self, most: int, *, short: float = SHORT_SECONDS) -> None:
        self._most = most
        self._limit = short
        self._steps: deque[Head] = deque()
        self._average: float | None = None
        self._lock = threading.Lock()

    @property
    def short(self) -> bool:
        """Tell whether steps have taken little time lately; unknown before the first."""
        return self._average is not None and self._average < self._limit

    def measured(self, seconds: float) -> None:
        """Note how long a step has held its slot."""
        average = self._average
        self._average = seconds if average is None else (1 - _SHARE) * average + _SHARE * seconds

    def keep(self, heads: Sequence[Head], queues: Collection[int]) -> list[Head]:
        """Keep slow steps of these queues where steps are short; return the others, which are to be sent."""
        if not self.short:
            return list(heads)
        sent: list[Head] = []
        with self._lock:
            for head in heads:
                if head.weight == Weight.SLOW and head.queue in queues and len(self._steps) < self._most:
                    self._steps.append(head)
                else:
                    sent.append(head)
        return sent

    def take(self, count: int | None = None) -> list[Head]:
        """Return the next steps for so many free slots; all of them without a count."""
        with self._lock:
            found = len(self._steps) if count is None else min(len(self._steps), max(0, count))
            return [self._steps.popleft() for _ in range(found)]
