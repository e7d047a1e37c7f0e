"""The heartbeat of a worker: frequent while the worker holds steps, infrequent while it does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gorgon_common import metrics
from gorgon_common.engine.poison import BEAT_SECONDS
from gorgon_common.engine.records import Renewal
from gorgon_common.engine.worker_loop import StepRunner
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger
from gorgon_common.persistence.store import Store, Worker

log = get_logger(__name__)


class Heartbeat:
    """Renews the lease in its own thread; thread-safe.

    While the worker holds steps, a heartbeat is sent every BEAT_SECONDS, because `engine.poison` needs to know how long
    a step had run when its worker died.  While it holds none, one heartbeat per third of the lease is enough.  `worked`
    ends that longer pause, so a claimed step is never without heartbeats.  `measure` sets the gauges that another
    process serves.
    """

    def __init__(
        self,
        store: Store,
        member: Worker,
        machine: StepRunner,
        lease: float,
        measure: Callable[[], None],
        *,
        often: float = BEAT_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._member = member
        self._machine = machine
        self._lease = lease
        self._measure = measure
        self._clock = clock
        self._often = min(often, lease / 3)
        self._pause = self._often
        self._marks: dict[int, float] = {}
        self._told: dict[int, float] = {}
        self._renewing = threading.Lock()
        self._renewed = 0.0
        self._worked = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._forever, name="gorgon-heartbeat", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread.  The lease is not renewed after this returns, because a released lease must stay released."""
        with self._renewing:
            self._stop.set()
        self._worked.set()
        if self._thread.ident is not None:  # closed before it was ready, because the broker is unreachable
            self._thread.join(2)

    def worked(self) -> None:
        """Record that the worker has claimed or ended a step."""
        if not self._worked.is_set():
            self._worked.set()

    def mark(self, queue: int, sent: float) -> None:
        """Record a served message of a queue; `sent`: when it was sent (seconds since 1970)."""
        self._marks[queue] = max(self._marks.get(queue, 0.0), sent)
        self.worked()

    def renew(self) -> None:
        """Renew the lease, unless this process has released it.  Raises Unavailable."""
        with self._renewing:
            if self._stop.is_set():
                return
            now, marks = self._clock(), dict(self._marks)
            found = self._store.heartbeat(self._member, self._lease, marks)
            self._renewed, self._told = now, marks
        if found is Renewal.REVIVED:
            log.warning("the lease had run out: others may have taken steps over, and what we still run is fenced")
        elif found is Renewal.UNKNOWN:
            log.error("this worker is not registered any more and can take no steps; restart it")

    def renew_if_late(self) -> None:
        """Renew the lease if a heartbeat is overdue: the process was suspended, or the computer was asleep.

        Uses the wall clock, because the monotonic clock stops while the computer sleeps.
        """
        if not 0 <= self._clock() - self._renewed <= self._pause:
            self.renew()

    def beat(self) -> float:
        """Send one heartbeat; return the seconds until the next one if the worker does nothing in the meantime."""
        self._worked.clear()
        self._pause = self._often
        machine = self._machine
        try:
            self.renew()
            if machine.held or machine.backlog_seen:  # otherwise a message comes first
                machine.backlog_seen = bool(self._store.shelved())
            machine.reconcile()
            if metrics.multiprocess():
                self._measure()  # another process serves the metrics and cannot ask this one
            if not (machine.held or machine.backlog_seen or machine.doubts or self._marks != self._told):
                self._pause = self._lease / 3
            machine.outage.passed()
        except GorgonError as error:
            machine.outage.failed(error, "the heartbeat failed")
        except Exception as error:  # noqa: BLE001  if this thread died, the worker would lose all its steps
            log.error("the heartbeat failed", error=repr(error))
        return self._pause

    def _forever(self) -> None:
        while not self._stop.is_set():
            pause = self.beat()
            since = time.monotonic()
            if pause <= self._often or self._worked.wait(pause):
                self._stop.wait(max(0.0, self._often - (time.monotonic() - since)))
