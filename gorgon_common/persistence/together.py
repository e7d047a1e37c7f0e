"""Group commit without a timer: what many threads ask of the database goes there together."""

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
    """Something that one thread wants of `Together`: to reserve for a call, or to post facts."""

    def __init__(self, ask: Ask | None, facts: Facts) -> None:
        self.ask = ask
        self.facts = facts
        self.done = False
        self.answer: tuple[Any, ...] = ()
        self.error: BaseException | None = None
        self.turn = threading.Event()
        """It is done, or its thread is the next to do what is asked for."""


class Together:
    """Group commit without a timer: one thread does for all others what they have asked for meanwhile.

    Who is done is off at once, and may ask again while the next one works.  `work` gets asks (no call twice) and facts,
    and returns a row for each ask.
    """

    def __init__(self, work: Callable[[Sequence[Ask], Facts], Sequence[tuple[Any, ...]]]) -> None:
        self._work = work
        self._queue: deque[_Request] = deque()
        self._lock = threading.Lock()
        self._busy = False

    def do(self, ask: Ask | None, facts: Facts = ()) -> tuple[Any, ...]:
        """Return the row for the ask, or raise what its transaction has raised."""
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
        """Do what is asked for by now (the first of it is this thread's), and pass the work on."""
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
        except BaseException as error:  # each of those who asked gets it, or it would wait for ever
            for request in batch:
                request.error, request.done = error, True
            if not isinstance(error, Exception):
                raise
            return
        for request in batch:
            if request.ask is not None:
                request.answer = answers[request.ask[0]]
            request.done = True
