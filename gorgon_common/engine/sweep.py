"""Finds lost work and sends it again.

Runs as a thread in every worker and API process; a lease decides which one is active.  Two sweeps at once, or none for
a minute, do no harm: every change is conditional, and nothing depends on the timing.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import datetime

from gorgon_common.engine import reporting
from gorgon_common.engine.concurrency import evict
from gorgon_common.engine.context import RunCache
from gorgon_common.engine.outage import Outage
from gorgon_common.engine.ports import Canvas, DispatchStore
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.records import ReadyStep
from gorgon_common.errors import Conflict, GorgonError, Unavailable
from gorgon_common.logs import get_logger

INTERVAL = 1.0
"""Seconds between passes while steps are in progress."""
QUIET = 5.0
"""Seconds between checks while there is nothing to do; at most `machine.TIMER_SECONDS`, because the sweep ends longer
waits and must see them begin."""
TIDY_SECONDS = 60.0
"""Seconds after which a pass is made even if there is nothing to do."""
STEADY_SECONDS = 5.0
"""The same while steps are in progress and nothing is wrong with them."""
LEASE = 5.0
"""How long the one that sweeps is the only one while there is something to do."""
QUIET_LEASE = QUIET + LEASE
"""The same while there is nothing to do: it is renewed only every QUIET seconds."""
MARGIN = 2.0
"""It looks again at least so long before its lease is over."""
PROOF_SECONDS = 5.0
"""A message counts as lost if a message that was sent later was claimed at least this long ago."""
SURELY_LOST = 60.0
THOROUGH = 5
"""Every this many passes, and after as many seconds, all running steps are checked, not only those of workers that have
died since."""
SENT_BEFORE_DUE = 5.0
"""Seconds from sending a step's message until the step is due (`persistence.live.LOST_SECONDS`)."""

GRACE = 3.0
"""For this long after a database outage no worker is declared dead; workers send a heartbeat every two seconds."""

log = get_logger(__name__)


class Sweep:
    """Sweeps for one home and target: those of its publisher.

    `worker`: the number of this process's own worker.  Its steps are never reclaimed, since a process that sweeps is
    alive.
    """

    def __init__(
        self,
        shelf: DispatchStore,
        knowledge: RunCache,
        publisher: Publisher,
        canvas: Canvas,
        *,
        name: str,
        home: str,
        clock: Callable[[], float] = time.time,
        worker: int | None = None,
    ) -> None:
        self.shelf = shelf
        self.knowledge = knowledge
        self.publisher = publisher
        self.canvas = canvas
        self.name = name
        self.home = home
        self.target = publisher.target
        self.worker = worker
        self.renew: Callable[[], None] = lambda: None
        """Renews the lease of this process's worker if that is overdue; raises Unavailable."""
        self.outage = Outage()
        self._clock = clock
        self._passes = 0
        self._thorough = float("-inf")
        self._epoch: str | None = None
        self._blind_until = float("-inf")
        self._seen: deque[tuple[float, dict[int, float]]] = deque(maxlen=60)
        self._tidied = float("-inf")
        self._next_due = float("inf")
        self._leading = False
        self._lease = LEASE
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Sweep in a thread: every second, or less often while there is nothing to do."""
        self._thread = threading.Thread(target=self._forever, name="gorgon-sweep", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(5)

    def _forever(self) -> None:
        pause = INTERVAL
        while not self._stop.wait(pause):
            pause = INTERVAL
            try:
                pause = self.look()
            except GorgonError as error:
                self.outage.failed(error, "the sweep will try again")
            except Exception as error:  # noqa: BLE001  this thread must survive: nothing else recovers lost work
                log.error("the sweep failed", error=repr(error))

    def look(self) -> float:
        """Make a pass if this sweep leads and there is work to do; return the seconds until the next check.

        Raises Unavailable.
        """
        with self._seeing():
            # The leader continues; the others check again when its lease should have expired.
            left = 0.0 if self._leading else self.shelf.leads_for(self._job)
            self._leading = left == 0.0 and self._leads()
            if not self._leading:
                return min(QUIET_LEASE, max(INTERVAL, left))
            now, lease = self._clock(), self._lease
            if now >= self._next_due:  # known from the last check, so this one can look for what comes after it
                self._due()
            found = self.shelf.activity(home=self.home, target=self.target)
            if found.pressing or now - self._tidied >= (STEADY_SECONDS if found.busy else TIDY_SECONDS):
                self._tidied = now
                self._pass()
            elif found.next is not None and found.next <= 0:
                self._due()
            self._next_due = float("inf") if found.next is None or found.next <= 0 else now + found.next
            self._lease = LEASE if found.busy else QUIET_LEASE
            if found.busy:
                return INTERVAL
            quiet = min(QUIET, lease - MARGIN)
            return quiet if found.next is None else min(quiet, max(INTERVAL, found.next))

    def once(self) -> int:
        """Make one pass if this sweep leads.  Returns the number of messages sent again.  Raises Unavailable."""
        with self._seeing():
            return self._pass() if self._leads() else 0

    @contextlib.contextmanager
    def _seeing(self) -> Iterator[None]:
        try:
            yield
        except Unavailable:
            self._blind_until = self._clock() + GRACE
            raise

    @property
    def _job(self) -> str:
        return f"sweep:{self.target}:{self.home}"

    def _leads(self) -> bool:
        return self.shelf.lead(self._job, self.name, self._lease)

    def _pass(self) -> int:
        self.renew()  # otherwise a process that was suspended would count as dead
        self._time_is_up()
        self._take_turns()
        for number in self.shelf.held_runs(home=self.home, target=self.target):
            self.publisher.publish(self.shelf.claim_limited(None, number).ready)
        sent = self._recover()
        sent += self._resend()
        self.publisher.refill()
        return sent

    def _due(self) -> None:
        """Do only what `activity` has seen to be due: a part of a pass."""
        self._next_due = float("inf")
        self._time_is_up()
        self._resend()

    def _time_is_up(self) -> None:
        for number in self.shelf.expired_runs(home=self.home, target=self.target):
            run = self.knowledge.run(number)
            limit = run.plan.limits.get("timeout")
            error = {
                "step": None,
                "kind": "timeout",
                "message": f"The run took longer than its limit of {limit:g} s.",
                "hint": "Raise `timeout:` under `limits:`, or look at what it waited for: gorgon runs logs.",
                "summary": f"{run.info.workflow}: the run took longer than {limit:g} s",
            }
            try:
                heads = self.shelf.stop(number, gate=run.gate, keeps=run.keeps, error=error, reason="time is up")
            except Conflict:
                continue
            self.publisher.publish(heads)

    def _take_turns(self) -> None:
        """Finish the concurrency-key work that the process which ended or submitted a run left undone."""
        for turn in self.shelf.turns(home=self.home, target=self.target):
            if self._clock() >= self._blind_until:
                for number in turn.dead:  # as a resume would: the run can still be resumed
                    if self._alien(number) and self.shelf.close_orphan(number):
                        log.warning(
                            "a run is ended: its process died, and others wait for its concurrency key",
                            run_id=self.knowledge.run(number).info.public_id,
                        )
            evict(self.shelf, self.knowledge, self.publisher, turn.evict)
            if turn.ready or turn.dead:
                self.publisher.publish(self.shelf.take_turn(turn.key, home=self.home))

    def _alien(self, number: int) -> bool:
        """Tell whether a run belongs to another home.  This process is alive, whatever its lease says."""
        return self.worker is None or self.knowledge.run(number).info.home != self.home

    def _recover(self) -> int:
        """Reclaim the steps of dead workers; these steps are sent first."""
        if self._clock() < self._blind_until:
            return 0  # leases expired because no worker could renew them
        now = self._clock()
        thorough = self._passes % THOROUGH == 0 or now - self._thorough >= THOROUGH
        self._passes += 1
        if thorough:
            self._thorough = now
        recovered = self.shelf.reap(home=self.home, target=self.target, sparing=self.worker, thorough=thorough)
        reporting.recovered(self.knowledge, recovered.again, "worker_died")
        for head in recovered.again:  # one message each: a suspect must not take other steps down with it
            self.publisher.publish([head], recovered=True)
        self.publisher.publish(recovered.freed)
        return len(recovered.again)

    def _resend(self) -> int:
        """Send lost messages again, and wake steps whose wait is over."""
        emptied = self._emptied()
        if emptied:  # the canvases are gone, so each commit must publish the steps that it makes ready
            self.shelf.detach_all(home=self.home, target=self.target)
        late, sleepers = self.shelf.overdue(home=self.home, target=self.target, all_ready=emptied)
        marks = self._proof()
        empty: dict[int, bool] = {}
        lost = [head for head, due in late if emptied or self._lost(head, due, marks, empty)]
        still = set(self.shelf.redispatch([head.id for head in lost])) if lost else set()
        again = [head for head in lost if head.id in still]
        if again:
            reporting.recovered(self.knowledge, again, "message_lost")
            self.publisher.publish(again, recovered=True)
        if sleepers:
            self.publisher.publish(self.shelf.wake(sleepers))
        return len(again)

    def _emptied(self) -> bool:
        """Tell whether the broker has lost its data since the last pass."""
        try:
            epoch = self.canvas.epoch()
        except Unavailable:
            return False
        emptied = self._epoch is not None and epoch is not None and epoch != self._epoch
        self._epoch = epoch or self._epoch
        return emptied

    def _proof(self) -> dict[int, float]:
        """Map each queue to a time: messages that were sent before it and are still unclaimed are lost."""
        now = self._clock()
        self._seen.append((now, self.shelf.watermarks(home=self.home, target=self.target)))
        old = [marks for at, marks in self._seen if at <= now - PROOF_SECONDS]
        return old[-1] if old else {}

    def _lost(self, head: ReadyStep, due: datetime, marks: dict[int, float], empty: dict[int, bool]) -> bool:
        if head.queue not in empty:
            try:
                empty[head.queue] = self.canvas.depth(head.queue) == 0
            except Unavailable:
                empty[head.queue] = False
        sent = due.timestamp() - SENT_BEFORE_DUE
        return empty[head.queue] or sent < marks.get(head.queue, 0.0) or sent < self._clock() - SURELY_LOST
