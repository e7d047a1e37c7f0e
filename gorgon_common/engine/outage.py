"""Database outages: what is logged, and when a process gives up.

A server process waits indefinitely, until an operator restarts the database or frees disk space.  `gorgon run` also
waits for a broken connection, but not for a SQLite file that cannot be written: it ends, so that the user learns that
the disk needs space.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gorgon_common.errors import ConfigurationError, GorgonError, StorageFault
from gorgon_common.logs import get_logger

LOG_SECONDS = 60.0
"""Minimum interval between two log lines with the same message."""
FAULT_SECONDS = 4.0
"""Seconds to wait for a file that cannot be written: another program may have filled the disk only briefly."""

log = get_logger(__name__)


class Outage:
    """The state of one process's database outage; thread-safe.

    `leaves`: the process gives up if the database file cannot be used.  `clock`: seconds, monotonic.
    """

    def __init__(self, *, leaves: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.final: GorgonError | None = None
        """Why this process has given up; None while it continues."""
        self.current: GorgonError | None = None
        """The current error; None while the database can be used."""
        self._leaves = leaves
        self._clock = clock
        self._lock = threading.Lock()
        self._since = 0.0
        self._logged: dict[str, float] = {}

    def failed(
        self,
        error: GorgonError,
        event: str = "the database cannot be used; results are held",
        *,
        since: float | None = None,
    ) -> float:
        """Record a failed write, and log it unless the same message was logged within LOG_SECONDS.

        `since`: when this write first failed, if it is being retried; other writes may succeed in the meantime, because
        a full disk can still hold a small row.  Returns that time, or now if none is given.
        """
        with self._lock:
            now = self._clock()
            if not isinstance(self.current, StorageFault):
                self._since = now
            self.current = error
            first = self._since if since is None else since
            if self._leaves and (
                isinstance(error, ConfigurationError)  # a damaged file stays damaged
                or (isinstance(error, StorageFault) and now - first >= FAULT_SECONDS)
            ):
                self.final = self.final or error
            due = self._is_due(error.message, now)
        if due:
            # For `gorgon run`, the view of the run shows the error.
            (log.info if self._leaves else log.warning)(event, error=error.message)
        return now if since is None else since

    def passed(self) -> None:
        """Record a successful write."""
        if self.current is None:
            return
        with self._lock:
            self.current = None
            due = self._is_due("", self._clock())
        if due:
            (log.info if self._leaves else log.warning)("the database can be used again")

    def _is_due(self, text: str, now: float) -> bool:
        last = self._logged.get(text)
        if last is not None and now - last < LOG_SECONDS:
            return False
        self._logged = {known: at for known, at in self._logged.items() if now - at < LOG_SECONDS}
        self._logged[text] = now
        return True
