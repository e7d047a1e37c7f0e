"""A database that cannot be used for a while: what is logged of it, and when a process stops to wait for it.

A server waits for ever: somebody restarts the database or makes room on its disk, and everything goes on.  The process
of `gorgon run` waits for a broken connection too, but not for a SQLite file that cannot be written: the person in front
of it has to make room, and is told so when it ends.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gorgon_common.errors import ConfigurationError, GorgonError, StorageFault
from gorgon_common.logs import get_logger

LOG_SECONDS = 60.0
"""The same thing is logged at most so often."""
FAULT_SECONDS = 4.0
"""How long a file that cannot be written is waited for: another program may just have filled the disk for a moment."""

log = get_logger(__name__)


class Outage:
    """What one process knows of the faults of its database; thread-safe.

    `leaves`: the process gives up where the file of the database cannot be used.  `clock`: seconds, monotonic.
    """

    def __init__(self, *, leaves: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.final: GorgonError | None = None
        """Why this process has given up; None while it goes on."""
        self.current: GorgonError | None = None
        """What is the matter now; None while the database can be used."""
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
        """Note that something could not be stored; logs it unless the same was logged within the last minute.

        `since`: when this very thing first failed, where it is tried again and again: others may succeed meanwhile, as
        a full disk still takes a small row.  Returns that time, which is now where none is given.
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
            # Where a person waits for the run, the view of the run says it.
            (log.info if self._leaves else log.warning)(event, error=error.message)
        return now if since is None else since

    def passed(self) -> None:
        """Note that something was stored."""
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
