"""One worker process: the machine and its dependencies, the heartbeat and the sweep."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from gorgon_common import metrics
from gorgon_common import queues as queue_names
from gorgon_common.bootstrap import Services
from gorgon_common.clock import SYSTEM_CLOCK
from gorgon_common.engine import rows
from gorgon_common.engine.kinds.base import StepServices
from gorgon_common.engine.machine import Machine
from gorgon_common.engine.poison import BEAT_SECONDS
from gorgon_common.engine.ports import AgentProvider, CommandRunner, Pricer
from gorgon_common.engine.records import ROW_BITS, Renewal, Weight
from gorgon_common.engine.states import FINISHED_STEP, StepStatus
from gorgon_common.engine.step import Executor
from gorgon_common.engine.sweep import Sweep
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger

CANCEL_SECONDS = 0.5

log = get_logger(__name__)


class Runtime:
    """Serves messages for one target (live, sandbox) and home; thread-safe."""

    def __init__(
        self,
        services: Services,
        *,
        queues: Sequence[str],
        slots: int,
        target: str,
        home: str,
        providers: Mapping[str, AgentProvider],
        close_providers: Callable[[], None],
        commands: CommandRunner,
        pricer: Pricer,
    ) -> None:
        self.services = services
        self.store = services.store
        self.lease = services.settings.lease_seconds
        self.publisher = services.publisher(target, home)
        self._close_providers = close_providers
        self._cancelled: set[int] = set()
        self._marks: dict[int, float] = {}
        self._stop = threading.Event()
        self._interval = min(BEAT_SECONDS, self.lease / 3)
        self._renewing = threading.Lock()
        self._renewed = 0.0
        numbers = sorted({rows.QUEUE_NUMBERS[queue] for queue in queues} | {rows.CONTROL})
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.member = self.store.register(
            self.name, target=target, home=home, queues=numbers, slots=slots, lease=self.lease
        )
        self.executor = Executor(
            StepServices(
                cache=services.knowledge,
                providers=providers,
                commands=commands,
                pricer=pricer,
                clock=SYSTEM_CLOCK,
                cancelled=self._cancelled.__contains__,
                budgets=services.budgets,
                poison_deaths=services.settings.poison_deaths,
            )
        )
        self.machine = Machine(self.store, services.knowledge, self.member, self.executor, self.publisher, slots=slots)
        self.publisher.here = self.machine.run_here
        self.publisher.shelved = self._backlog
        self.sweep = Sweep(
            self.store,
            services.knowledge,
            self.publisher,
            services.canvas(target),
            name=f"{self.name}:{self.member.owner}",
            home=home,
            worker=self.member.owner,
        )
        self.machine.renew = self._renew
        self.sweep.renew = self._renew_if_late
        self.sweep.outage = self.machine.outage
        self._threads = [
            threading.Thread(target=self._beat, name="gorgon-heartbeat", daemon=True),
            threading.Thread(target=self._watch, name="gorgon-cancel", daemon=True),
        ]

    def start(self) -> None:
        """Start the heartbeat, the watch for cancelled runs and the sweep."""
        metrics.watch(self.measure)
        for thread in self._threads:
            thread.start()
        self.sweep.start()

    def serve(self, ids: Sequence[int], sent: float, queue: str, *, fast: bool, counts: bool) -> bool:
        """Serve a message of a queue.

        `counts`: a canvas continues when this returns.  Returns False if the message's steps are pending or held
        elsewhere, so that nothing may follow from this message.
        """
        number = rows.QUEUE_NUMBERS.get(queue.rpartition(".")[2], rows.CONTROL)
        try:
            self.machine.handle(ids, fast=fast)
        except GorgonError:
            if self.machine.outage.final is None:
                raise
            return False  # the process ends with what is the matter; Celery would log it with a traceback
        self._marks[number] = max(self._marks.get(number, 0.0), sent)
        if not counts:
            return True
        known = self.store.states(ids)
        return bool(known) and all(StepStatus(status) in FINISHED_STEP for status, _ in known.values())

    def cancel(self, run: int) -> None:
        """Abort a run's calls immediately, without waiting for the watch."""
        self._cancelled.add(run)

    def trouble(self) -> str:
        """Return what keeps the steps of this process from going on, in a sentence; empty where nothing does.

        Raises StorageFault or ConfigurationError where this process has given up.
        """
        outage = self.machine.outage
        if outage.final is not None:
            raise outage.final
        return f"Trying again: {outage.current.message}" if outage.current is not None else ""

    def measure(self) -> None:
        """Set the gauge of steps that this worker is running; for `metrics.watch`."""
        held = Counter(step.queue for step in list(self.machine.held.values()) if step.weight == Weight.SLOW)
        for number in self.member.queues:
            metrics.SLOTS_BUSY.set(held.get(number, 0), queue=queue_names.ALL[number])

    def _backlog(self) -> None:
        self.machine.backlog_seen = True

    def _renew(self) -> None:
        """Renew the lease, unless this process has released it.  Raises Unavailable."""
        with self._renewing:
            if self._stop.is_set():
                return
            now = time.time()
            found = self.store.heartbeat(self.member, self.lease, self._marks)
            self._renewed = now
        if found is Renewal.REVIVED:
            log.warning("the lease had run out: others may have taken steps over, and what we still run is fenced")
        elif found is Renewal.UNKNOWN:
            log.error("this worker is not registered any more and can take no steps; restart it")

    def _renew_if_late(self) -> None:
        """Renew the lease if no heartbeat came in time: the process was suspended, or the computer was asleep.

        Uses the wall clock, because the monotonic clock stops while the computer sleeps.
        """
        if not 0 <= time.time() - self._renewed <= self._interval:
            self._renew()

    def _beat(self) -> None:
        while not self._stop.is_set():
            try:
                self._renew()
                if self.machine.held or self.machine.backlog_seen:  # otherwise a message comes first
                    self.machine.backlog_seen = bool(self.store.shelved())
                self.machine.reconcile()
                if metrics.multiprocess():
                    self.measure()  # another process serves the metrics and cannot ask this one
                self.machine.outage.passed()
            except GorgonError as error:
                self.machine.outage.failed(error, "the heartbeat failed")
            except Exception as error:  # noqa: BLE001  if this thread died, the worker would lose all its steps
                log.error("the heartbeat failed", error=repr(error))
            self._stop.wait(self._interval)

    def _watch(self) -> None:
        while not self._stop.wait(CANCEL_SECONDS):
            held = {key >> ROW_BITS for key in list(self.machine.held)}
            self._cancelled.intersection_update(held)
            try:
                self._cancelled.update(self.store.cancelled(held - self._cancelled))
            except GorgonError:
                continue

    def close(self, seconds: float) -> bool:
        """Take no new work, wait this long for held steps, then release the lease.  Returns whether all had ended.

        Steps that have not ended are given back, so that another worker can claim them immediately.
        """
        metrics.unwatch(self.measure)
        ended = self.machine.close(seconds)
        if not ended:
            log.warning("steps had not ended within the grace period: others run them again")
        with self._renewing:  # a released lease must not be renewed
            self._stop.set()
        self.sweep.stop()
        for thread in self._threads:
            if thread.ident is not None:  # closed before it was ready, because the broker is unreachable
                thread.join(2)
        try:
            self.store.retire(self.member)
        except GorgonError as error:
            if self.machine.outage.final is None:  # else the process ends with what is the matter
                log.warning("the lease was not given up", error=error.message)
        self._close_providers()
        return ended
