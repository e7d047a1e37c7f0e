"""Sends the messages of ready steps; the only module that does.

Submission, finish, resume and sweep all publish through it.  A queue receives steps in proportion to its workers'
slots.  The rest stays in the database, ordered fairly among teams, so a backlog takes up no space in Redis and does not
delay a team with little work.  A message that cannot be sent is not lost: its step is ready in the database, and the
sweep sends it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from gorgon_common.engine.context import RunCache
from gorgon_common.engine.records import ROW_BITS, Claimed, ReadyStep, Weight
from gorgon_common.engine.store_ports import Canvas, DispatchStore
from gorgon_common.errors import PlanTooNew, Unavailable
from gorgon_common.logs import get_logger

AHEAD = 1
"""Steps in the broker per live slot.  Additional steps would find no slot and come back; workers pull from the backlog
whenever a slot becomes free.
"""
LEAST_ROOM = 64
"""Steps that a queue may hold even if no worker is known yet."""
REFILL = 16
"""Steps that a sweep pass takes from a queue's backlog.  They wake idle workers, which then pull more."""
SLOTS_SECONDS = 1.0

log = get_logger(__name__)


class Publisher:
    """Publishes ready steps for one target and home; thread-safe.

    `here` takes over steps that need no provider, if this process runs steps itself.
    """

    def __init__(
        self,
        shelf: DispatchStore,
        knowledge: RunCache,
        canvas: Canvas,
        *,
        target: str,
        home: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.shelf = shelf
        self.knowledge = knowledge
        self.canvas = canvas
        self.target = target
        self.home = home
        self.here: Callable[[Sequence[ReadyStep]], None] | None = None
        self.shelved: Callable[[], None] = lambda: None
        self._clock = clock
        self._lock = threading.Lock()
        self._slots: dict[int, int] = {}
        self._slots_at = float("-inf")

    def publish(self, heads: Sequence[ReadyStep], *, join: int | None = None, recovered: bool = False) -> None:
        """Send as many steps as there is room for, and put the rest on the backlog.

        `join`: the step that a canvas of these steps leads to.  `recovered` steps are sent first, regardless of room.
        """
        if self.here is not None:
            inline = [head for head in heads if head.weight == Weight.INLINE]
            if inline:
                self.here(inline)
                heads = [head for head in heads if head.weight != Weight.INLINE]
        for run, members in _by_run(heads).items():
            if not self._reads(run):
                continue
            fits = members if recovered else self._fits(members)
            if fits:
                self._send(run, fits, join if len(fits) == len(members) else None)
            if len(fits) < len(members):
                self._enqueue(run, members[len(fits) :], join)

    def _reads(self, run: int) -> bool:
        """Return whether this version reads the plan of a run; steps of others are left to a newer version's sweep."""
        try:
            self.knowledge.run(run)
        except PlanTooNew as error:
            log.warning("steps are left to a newer version", run=run, error=error.message)
            return False
        return True

    def give_back(self, ids: Sequence[int]) -> None:
        """Put steps whose message found no free slot at the front of the backlog."""
        ready = set(self.shelf.redispatch(ids))
        heads = [head for head in self._heads(ids) if head.id in ready]
        if heads:
            self.shelf.enqueue(heads, self.knowledge.run(heads[0].id >> ROW_BITS).info.team, first=True)
            self.shelved()

    def held(self, ids: Sequence[int]) -> None:
        """Detach steps from their canvas: they wait until fewer steps of their run are in progress."""
        for run, heads in _by_run(self._heads(ids)).items():
            left = self.canvas.lower(self.knowledge.run(run), heads, None)
            self._detach([*left.dropped, *left.carried])

    def departed(self, step: Claimed) -> None:
        """Detach a parked step from its canvas, and send what that canvas would have sent."""
        head = ReadyStep(step.id, step.node, step.weight, step.queue, step.crashes)
        dropped = self.canvas.lower(self.knowledge.run(step.run), [head], None)
        self._detach([*dropped.dropped, *dropped.carried])

    def refill(self) -> None:
        """Send steps from the backlog while the queues have room."""
        for queue in self.shelf.shelved():
            room = min(REFILL, self._room(queue))
            heads = self.shelf.dequeue(queue, room, target=self.target, home=self.home) if room > 0 else []
            for run, members in _by_run(heads).items():
                self._send(run, members, None)

    def _heads(self, ids: Sequence[int]) -> list[ReadyStep]:
        heads = []
        for key in ids:
            run = self.knowledge.run(key >> ROW_BITS)
            number, _, _ = run.place(key & ((1 << ROW_BITS) - 1))
            heads.append(ReadyStep(key, number, *run.shape(number)))
        return heads

    def _fits(self, heads: Sequence[ReadyStep]) -> Sequence[ReadyStep]:
        """Return the longest prefix of the steps that all queues have room for."""
        wanted: dict[int, int] = {}
        for place, head in enumerate(heads):
            if head.weight == Weight.SLOW:
                wanted[head.queue] = wanted.get(head.queue, 0) + 1
                if wanted[head.queue] > self._room(head.queue):
                    return heads[:place]
        return heads

    def _room(self, queue: int) -> int:
        """Return how many more steps a queue may receive."""
        now = self._clock()
        with self._lock:
            if now - self._slots_at > SLOTS_SECONDS:
                self._slots, self._slots_at = self.shelf.slots(self.target, self.home), now
            most = max(LEAST_ROOM, AHEAD * self._slots.get(queue, 0))
        try:
            return most - self.canvas.depth(queue)
        except Unavailable:
            return 0

    def _enqueue(self, run: int, heads: Sequence[ReadyStep], join: int | None) -> None:
        self.shelf.enqueue(heads, self.knowledge.run(run).info.team)
        self.shelved()
        alone = self.canvas.lower(self.knowledge.run(run), heads, None)
        self._detach([*alone.dropped, *([] if join is None else [join])])

    def _send(self, run: int, heads: Sequence[ReadyStep], join: int | None) -> None:
        known = self.knowledge.run(run)
        lowered = self.canvas.lower(known, heads, join)
        if lowered.carried:
            self.shelf.attach(lowered.carried)
        self._detach(lowered.dropped)
        try:
            self.canvas.send(lowered)
        except Unavailable as error:
            log.warning("messages were not sent; the sweep will", steps=len(heads), error=error.message)

    def _detach(self, ids: Sequence[int]) -> None:
        if ids:
            ready = self.shelf.detach(ids)
            if ready:
                self.publish(ready)


def _by_run(heads: Sequence[ReadyStep]) -> dict[int, list[ReadyStep]]:
    runs: dict[int, list[ReadyStep]] = {}
    for head in heads:
        runs.setdefault(head.id >> ROW_BITS, []).append(head)
    return runs
