"""Steps that mainly compute: one thread runs them one after another and commits them together.

Threads cannot compute at the same time, so handing such steps to several of them only adds the cost of switching.  A
step may turn out to wait after all, for its provider or for a quota.  The steps behind it are then handed over to other
threads within a few milliseconds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from gorgon_common.engine.records import Claimed

LATE_SECONDS = 0.005
"""A step that has run for this long no longer holds up the steps behind it."""
BUSY_SHARE = 0.6
"""Steps are run one after another while at least this share of their time is computation."""
_NEWEST = 0.1
"""Weight of the newest measurement in the moving average."""


class BusyShare:
    """Tells whether steps of this process mainly compute; False before the first measurement."""

    def __init__(self) -> None:
        self._share = 0.0

    @property
    def high(self) -> bool:
        """Tell whether running the steps one after another costs no time."""
        return self._share >= BUSY_SHARE

    def measured(self, seconds: float, cpu: float, beside: int) -> None:
        """Record a step: how long it took, what it computed, and how many steps ran at the same time, itself included.

        Steps that compute at the same time take turns, so the computation of all of them fills the time of each.
        """
        share = min(1.0, cpu * max(1, beside) / seconds) if seconds > 0 else 1.0
        self._share = (1 - _NEWEST) * self._share + _NEWEST * share


class Line:
    """Steps that one thread runs in turn.  `rest` may be called by another thread while one of them runs."""

    def __init__(self, steps: Sequence[Claimed]) -> None:
        self._steps = deque(steps)
        self._since = time.monotonic()

    def next(self) -> Claimed | None:
        """Remove and return the next step, None if there is none."""
        self._since = time.monotonic()
        try:
            return self._steps.popleft()  # atomic, as `rest` may be called at this moment
        except IndexError:
            return None

    def rest(self) -> list[Claimed]:
        """Remove and return the steps that have not begun."""
        found = []
        with contextlib.suppress(IndexError):
            while True:
                found.append(self._steps.popleft())
        return found

    def late(self) -> bool:
        """Tell whether steps wait behind one that takes long."""
        return bool(self._steps) and time.monotonic() - self._since > LATE_SECONDS


class LateSteps:
    """Watches lines, and calls `hand_over` with the steps that wait behind one that takes long."""

    def __init__(self) -> None:
        self._lines: dict[Line, Callable[[Sequence[Claimed]], None]] = {}
        self._some = threading.Event()
        self._closed = False
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    @contextlib.contextmanager
    def watching(self, line: Line, hand_over: Callable[[Sequence[Claimed]], None]) -> Iterator[None]:
        """Watch a line while the block runs."""
        self._lines[line] = hand_over
        self._some.set()
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._forever, name="gorgon-late", daemon=True)
                    self._thread.start()
        try:
            yield
        finally:
            del self._lines[line]

    def close(self) -> None:
        """End the thread."""
        self._closed = True
        self._some.set()

    def _forever(self) -> None:
        while not self._closed:
            self._some.wait()
            time.sleep(LATE_SECONDS)
            for line, hand_over in list(self._lines.items()):
                if line.late():
                    hand_over(line.rest())
            if not self._lines:
                self._some.clear()
                if self._lines or self._closed:  # a line was added between these two statements
                    self._some.set()
