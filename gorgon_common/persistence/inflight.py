"""The calls of this process that no budget counts: where one is set while they are under way, they are reserved on it.

A call costs two changes of a dictionary; while there are such calls, one query twice a second looks for new budgets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from gorgon_common.engine.records import RunInfo
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger

LOOK_SECONDS = 0.4
"""Whoever sets a budget waits longer than that."""

Key = tuple[int, int, int]
log = get_logger(__name__)


@dataclass(slots=True)
class Call:
    """A call under way.  `bound()` is (micro-dollars, tokens, longest reply).  `held`: something is reserved for it."""

    key: Key
    info: RunInfo
    bound: Callable[[], tuple[int, int, int]]
    held: bool = False


class InFlight:
    """Thread-safe.  `hold` reserves for a call on the budgets that count it by now; tells whether there are any."""

    def __init__(self, hold: Callable[[Call], bool]) -> None:
        self._hold = hold
        self._calls: dict[Key, Call] = {}
        self._lock = threading.Lock()
        self._some = threading.Condition(self._lock)
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, call: Call) -> None:
        """A call begins."""
        with self._some:
            self._calls[call.key] = call
            if self._thread is None:
                self._thread = threading.Thread(target=self._forever, name="gorgon-inflight", daemon=True)
                self._thread.start()
            self._some.notify()

    def over(self, key: Key) -> bool:
        """A call is over; returns whether something is held for it."""
        with self._lock:  # not while it is being reserved for: a settlement before its reservation would be lost
            call = self._calls.pop(key, None)
        return call is not None and call.held

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        with self._some:
            self._calls.clear()
            self._some.notify()

    def _forever(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            with self._some:
                while not self._calls and not self._closed.is_set():
                    self._some.wait()
            self.look()

    def look(self) -> None:
        """Reserve for the calls that a budget counts by now."""
        for key in list(self._calls):
            with self._lock:
                call = self._calls.get(key)
                if call is None or call.held:
                    continue
                try:
                    call.held = self._hold(call)
                except GorgonError as error:
                    log.warning("a call under way was not counted on a new budget", error=error.message)
                    return
