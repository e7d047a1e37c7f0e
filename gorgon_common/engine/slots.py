"""Ready steps that wait in a worker process for its next free slot, without a message and without a claim.

A message costs a worker more than a step whose provider answers immediately.  Where slots become free within
milliseconds, steps that become ready in this process are therefore kept for those slots.  The steps are not claimed, so
another worker may take them; a slot that finds its step taken simply claims nothing.  If the process dies, the sweep
sends the steps it kept.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Collection, Sequence

from gorgon_common.engine.records import ReadyStep, Weight

SHORT_SECONDS = 0.005
"""Steps shorter than this free their slots soon enough to wait for."""
PATIENCE_SHARE = 0.05
PATIENCE_LEAST, PATIENCE_MOST = 0.0005, 0.004
_SHARE = 0.1
"""Weight of the newest measurement in the moving average."""


class ReadyQueue:
    """Holds at most `most` ready steps of a process; thread-safe.  Steps count as short below `short` seconds."""

    def __init__(self, most: int, *, short: float = SHORT_SECONDS) -> None:
        self._most = most
        self._limit = short
        self._steps: deque[ReadyStep] = deque()
        self._average: float | None = None
        self._lock = threading.Lock()

    @property
    def short(self) -> bool:
        """Tell whether recent steps were short; False before the first measurement."""
        return self._average is not None and self._average < self._limit

    @property
    def patience(self) -> float:
        """How long a commit waits for steps that are about to end, so that they are committed together (seconds).

        Steps that begin together mostly end together.  The wait is a small part of what a step takes.
        """
        if not self._limit or self._average is None:
            return 0.0
        return min(PATIENCE_MOST, max(PATIENCE_LEAST, PATIENCE_SHARE * self._average))

    def measured(self, seconds: float) -> None:
        """Record how long a step held its slot."""
        average = self._average
        self._average = seconds if average is None else (1 - _SHARE) * average + _SHARE * seconds

    def keep(self, heads: Sequence[ReadyStep], queues: Collection[int]) -> list[ReadyStep]:
        """Keep slow steps of these queues while steps are short.  Returns the other steps, which must be sent."""
        if not self.short:
            return list(heads)
        sent: list[ReadyStep] = []
        with self._lock:
            for head in heads:
                if head.weight == Weight.SLOW and head.queue in queues and len(self._steps) < self._most:
                    self._steps.append(head)
                else:
                    sent.append(head)
        return sent

    def take(self, count: int | None = None) -> list[ReadyStep]:
        """Remove and return up to `count` steps, one per free slot; all steps without a count."""
        with self._lock:
            found = len(self._steps) if count is None else min(len(self._steps), max(0, count))
            return [self._steps.popleft() for _ in range(found)]
