"""The calls of this process that no budget counts.  If a budget is set while they run, they are reserved on it.

A call costs two changes of a dictionary.  While there are such calls, one query twice a second looks for new budgets.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from gorgon_common.engine.records import RunInfo
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger

LOOK_SECONDS = 0.4
"""Setting a budget waits longer than this."""

Key = tuple[int, int, int]
log = get_logger(__name__)


@dataclass(slots=True)
class Call:
    """A call in flight.  `bound()` is (micro-dollars, tokens, longest reply).  `held`: an amount is reserved for it."""

    key: Key
    info: RunInfo
    bound: Callable[[], tuple[int, int, int]]
    held: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a reservation is made: a settlement posted before its reservation would be lost."""


class InFlight:
    """Thread-safe.  `hold` reserves for a call on the budgets that count it now; it returns whether there are any.

    No call waits for the database because of this, except one that ends during its own reservation.
    """

    def __init__(self, hold: Callable[[Call], bool]) -> None:
        self._hold = hold
        self._calls: dict[Key, Call] = {}
        self._some = threading.Event()
        self._closed = threading.Event()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def note(self, call: Call) -> None:
        """Record that a call begins."""
        self._calls[call.key] = call
        self._some.set()
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._forever, name="gorgon-inflight", daemon=True)
                    self._thread.start()

    def over(self, key: Key) -> bool:
        """Record that a call has ended; return whether an amount is reserved for it."""
        call = self._calls.pop(key, None)
        if call is None:
            return False
        with call.lock:
            return call.held

    def __len__(self) -> int:
        return len(self._calls)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._calls.clear()
        self._some.set()

    def _forever(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self._some.wait()
            self.look()
            if not self._calls:
                self._some.clear()
                if self._calls or self._closed.is_set():  # a call was noted between these two statements
                    self._some.set()

    def look(self) -> None:
        """Reserve for the noted calls that a budget now counts."""
        for call in list(self._calls.values()):
            with call.lock:
                if call.held or call.key not in self._calls:
                    continue
                try:
                    call.held = self._hold(call)
                except GorgonError as error:
                    log.warning("a call under way was not counted on a new budget", error=error.message)
                    return
