"""Group commit without a timer: the requests of many threads go to the database together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_common.persistence.budgets_sqlite import Key

BATCH = 64
Ask = tuple[Key, Sequence[int], int, int, int]
"""A call's key, its accounts, micro-dollars, tokens, longest reply."""
Facts = Sequence[Mapping[str, Any]]


class _Request:
    """A request of one thread to `Together`: to reserve for a call, or to post facts."""

    def __init__(self, ask: Ask | None, facts: Facts) -> None:
        self.ask = ask
        self.facts = facts
        self.done = False
        self.answer: tuple[Any, ...] = ()
        self.error: BaseException | None = None
        self.turn = threading.Event()
        """Set when the request is done, or when its thread has to process the next batch."""


class Together:
    """Group commit without a timer: one thread processes all requests that have arrived while the last batch ran.

    A thread that has finished leaves immediately; it may queue again while the next batch commits.  `work` gets asks
    (no call twice) and facts, and returns a row for each ask.
    """

    def __init__(self, work: Callable[[Sequence[Ask], Facts], Sequence[tuple[Any, ...]]]) -> None:
        self._work = work
        self._queue: deque[_Request] = deque()
        self._lock = threading.Lock()
        self._busy = False

    def do(self, ask: Ask | None, facts: Facts = ()) -> tuple[Any, ...]:
        """Return the row for the ask, or raise the exception of its transaction."""
        request = _Request(ask, facts)
        with self._lock:
            self._queue.append(request)
            waits, self._busy = self._busy, True
        if waits:
            request.turn.wait()
        if not request.done:
            self._next()
        if request.error is not None:
            raise request.error
        return request.answer

    def _next(self) -> None:
        """Process the next batch, whose first request is this thread's, and hand over to the next thread."""
        with self._lock:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
        try:
            self._serve(batch)
        finally:
            for request in batch:
                request.turn.set()
            with self._lock:
                self._busy = bool(self._queue)
                if self._busy:
                    self._queue[0].turn.set()

    def _serve(self, batch: Sequence[_Request]) -> None:
        asks: dict[Key, Ask] = {}
        for request in batch:
            if request.ask is not None:
                asks.setdefault(request.ask[0], request.ask)
        try:
            rows = self._work(list(asks.values()), [fact for request in batch for fact in request.facts])
            answers = dict(zip(asks, rows, strict=True))
        except BaseException as error:  # every thread of the batch has to get the error, or it would wait forever
            for request in batch:
                request.error, request.done = error, True
            if not isinstance(error, Exception):
                raise
            return
        for request in batch:
            if request.ask is not None:
                request.answer = answers[request.ask[0]]
            request.done = True
