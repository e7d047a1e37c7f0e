"""One worker process: the machine and its dependencies, the heartbeat and the sweep."""

from __future__ import annotations

import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from gorgon_common import metrics
from gorgon_common import queues as queue_names
from gorgon_common.bootstrap import Services
from gorgon_common.clock import SYSTEM_CLOCK
from gorgon_common.engine import rows
from gorgon_common.engine.calls.acquire import CallLimits
from gorgon_common.engine.kinds.base import StepServices
from gorgon_common.engine.ports import AgentProvider, CommandRunner, Pricer
from gorgon_common.engine.records import ROW_BITS, Weight
from gorgon_common.engine.states import FINISHED_STEP, StepStatus
from gorgon_common.engine.step import Executor
from gorgon_common.engine.sweep import Sweep
from gorgon_common.engine.worker_loop import StepRunner
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger
from gorgon_worker.heartbeat import Heartbeat

CANCEL_SECONDS = 0.5
"""How often cancelled runs are looked for while steps are held."""

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
        limits: CallLimits | None = None,
        close_providers: Callable[[], None],
        commands: CommandRunner,
        pricer: Pricer,
    ) -> None:
        self.services = services
        self.store = services.store
        self.publisher = services.publisher(target, home)
        self._close_providers = close_providers
        self._cancelled: set[int] = set()
        self._held = threading.Event()
        self._stop = threading.Event()
        lease = services.settings.lease_seconds
        numbers = sorted({rows.QUEUE_NUMBERS[queue] for queue in queues} | {rows.CONTROL})
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.member = self.store.register(self.name, target=target, home=home, queues=numbers, slots=slots, lease=lease)
        self.executor = Executor(
            StepServices(
                cache=services.knowledge,
                providers=providers,
                commands=commands,
                pricer=pricer,
                clock=SYSTEM_CLOCK,
                cancelled=self._cancelled.__contains__,
                budgets=services.budgets,
                limits=limits,
                poison_deaths=services.settings.poison_deaths,
            )
        )
        self.machine = StepRunner(
            self.store, services.knowledge, self.member, self.executor, self.publisher, slots=slots
        )
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
        self.heartbeat = Heartbeat(self.store, self.member, self.machine, lease, self.measure)
        self.machine.worked = self._worked
        self.machine.renew = self.heartbeat.renew
        self.sweep.renew = self.heartbeat.renew_if_late
        self.sweep.outage = self.machine.outage
        self._watching = threading.Thread(target=self._watch, name="gorgon-cancel", daemon=True)

    def start(self) -> None:
        """Start the heartbeat, the watch for cancelled runs and the sweep."""
        metrics.watch(self.measure)
        self.heartbeat.start()
        self._watching.start()
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
            return False  # the process ends and reports the error; Celery would log it with a traceback
        self.heartbeat.mark(number, sent)
        if not counts:
            return True
        known = self.store.states(ids)
        return bool(known) and all(StepStatus(status) in FINISHED_STEP for status, _ in known.values())

    def cancel(self, run: int) -> None:
        """Abort a run's calls immediately, without waiting for the watch."""
        self._cancelled.add(run)
        self._held.set()

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
        self.heartbeat.worked()

    def _worked(self) -> None:
        self.heartbeat.worked()
        if not self._held.is_set():
            self._held.set()

    def _watch(self) -> None:
        while not self._stop.wait(CANCEL_SECONDS):
            self._held.wait()
            self._held.clear()
            held = {key >> ROW_BITS for key in list(self.machine.held)}
            self._cancelled.intersection_update(held)
            if not held:
                continue
            self._held.set()
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
        self.heartbeat.stop()
        self._stop.set()
        self._held.set()
        self.sweep.stop()
        if self._watching.ident is not None:  # closed before it was ready, because the broker is unreachable
            self._watching.join(2)
        try:
            self.store.retire(self.member)
        except GorgonError as error:
            if self.machine.outage.final is None:  # else the process ends with what is the matter
                log.warning("the lease was not given up", error=error.message)
        self._close_providers()
        return ended
