"""Keeps the leases of calls in flight alive: a process that has died loses them, and others get their capacity."""

from __future__ import annotations

import threading

from gorgon_common.engine.limits import Grant, Limiter
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger

BEAT = 15.0
"""Seconds between two extensions of the leases of calls in flight."""

log = get_logger(__name__)


class Leases:
    """The calls in flight in this process; their leases are extended while the process is alive."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._held: dict[str, Grant] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, grant: Grant) -> None:
        """Keep a call's lease alive."""
        with self._lock:
            self._held[grant.id] = grant
            if self._thread is None:
                self._thread = threading.Thread(target=self._forever, name="gorgon-leases", daemon=True)
                self._thread.start()

    def drop(self, grant: Grant) -> None:
        """Stop extending the lease of a finished call."""
        with self._lock:
            self._held.pop(grant.id, None)

    def close(self) -> None:
        """Stop the thread."""
        self._stop.set()

    def extend(self) -> None:
        """Extend the leases of all calls in flight.  A failure is retried at the next interval."""
        with self._lock:
            held = list(self._held.values())
        try:
            if held:
                self._limiter.extend(held)
        except GorgonError as error:
            log.warning("leases were not extended", error=error.message)

    def _forever(self) -> None:
        while not self._stop.wait(BEAT):
            self.extend()
