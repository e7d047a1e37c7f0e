"""Group commit without a timer: the requests of many threads are served together.

One thread serves what has arrived while the previous batch was served.  A thread whose request is done leaves
immediately; it may queue again while the next batch is served.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from gorgon_common.errors import Unavailable

MOST = 256
LOOK_SECONDS = 0.0005

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class _Entry(Generic[Item]):
    __slots__ = ("answer", "done", "error", "item", "turn")

    def __init__(self, item: Item) -> None:
        self.item = item
        self.answer: Any = None
        self.error: BaseException | None = None
        self.done = False
        self.turn: threading.Event | None = None
        """Of a thread that waits: set when its request is done, or when it has to serve the next batch."""


class GroupCommit(Generic[Item, Answer]):
    """Serves items in batches; thread-safe.

    `work` gets the items of a batch, in the order in which they came, and returns an answer for each.  If it fails for
    several, each is tried alone, so that only the one that cannot be served fails; Unavailable concerns them all.
    `alone(item)`: it must not share a batch.  `patience()`: how many seconds a batch waits until it is as large as the
    last ones were; threads that came together once mostly come together again.  A thread without others never waits.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Answer]],
        *,
        most: int = MOST,
        alone: Callable[[Item], bool] = lambda _: False,
        patience: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._work = work
        self._most = most
        self._alone = alone
        self._patience = patience
        self._queue: deque[_Entry[Item]] = deque()
        self._lock = threading.Lock()
        self._serving = threading.Lock()
        self._expected = 0
        self._led = False
        """A thread serves a batch or is about to; it passes the lead on to the thread of the next request."""

    @property
    def waiting(self) -> int:
        """How many requests no batch has taken yet."""
        return len(self._queue)

    def do(self, item: Item) -> Answer:
        """Return the answer for an item, or raise the exception that its batch failed with."""
        entry = _Entry(item)
        with self._lock:
            self._queue.append(entry)
            if self._led:
                entry.turn = threading.Event()
            self._led = True
        if entry.turn is not None:
            entry.turn.wait()
        if not entry.done:
            self._lead()
        if entry.error is not None:
            raise entry.error
        answer: Answer = entry.answer
        return answer

    @contextlib.contextmanager
    def paused(self, seconds: float = -1) -> Iterator[bool]:
        """Wait for the batch under way, and hold up others during the block.  Yields False if that takes too long."""
        held = self._serving.acquire(timeout=seconds)
        try:
            yield held
        finally:
            if held:
                self._serving.release()

    def _lead(self) -> None:
        """Serve the next batch, which contains this thread's request, and pass on the lead."""
        self._gather()
        batch: list[_Entry[Item]] = []
        try:
            with self._serving:
                batch = self._next()
                self._expected = max(len(batch), self._expected - 1)
                self._serve(batch)
        finally:
            with self._lock:
                self._led = bool(self._queue)
                heir = self._queue[0].turn if self._led else None
            for entry in batch:
                if entry.turn is not None:
                    entry.turn.set()
            if heir is not None:
                heir.set()

    def _gather(self) -> None:
        """Wait for neighbours."""
        if len(self._queue) < self._expected:
            until = time.monotonic() + self._patience()
            while len(self._queue) < self._expected and time.monotonic() < until:
                time.sleep(LOOK_SECONDS)

    def _next(self) -> list[_Entry[Item]]:
        with self._lock:
            batch = [self._queue.popleft()]
            if not self._alone(batch[0].item):
                while self._queue and len(batch) < self._most and not self._alone(self._queue[0].item):
                    batch.append(self._queue.popleft())
            return batch

    def _serve(self, batch: Sequence[_Entry[Item]]) -> None:
        try:
            answers = self._work([entry.item for entry in batch])
            for entry, answer in zip(batch, answers, strict=True):
                entry.answer, entry.done = answer, True
        except BaseException as error:  # every thread of the batch has to get the error, or it would wait forever
            if len(batch) > 1 and isinstance(error, Exception) and not isinstance(error, Unavailable):
                for entry in batch:
                    self._serve([entry])
                return
            for entry in batch:
                entry.error, entry.done = error, True
            if not isinstance(error, Exception):
                raise
