"""The threads that serve messages: Celery's thread pool, but with a bounded stop."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery.concurrency.thread import TaskPool

STOP_SECONDS = 2.0


class ThreadPool(TaskPool):  # type: ignore[misc]  # celery has no types
    """A thread pool that stops in bounded time; the stock pool waits for every running call, however long it takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Celery's current application is thread-local; without it, chains and chords would go to a default broker.
        self.executor = ThreadPoolExecutor(
            self.limit, thread_name_prefix="gorgon-task", initializer=self.app.set_current
        )

    def on_stop(self) -> None:
        """Take no new work, and wait at most STOP_SECONDS."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.join(STOP_SECONDS)

    def join(self, seconds: float) -> None:
        """Wait until every thread has sent the successors of its message, for at most this many seconds."""
        until = time.monotonic() + seconds
        for thread in list(self.executor._threads):
            thread.join(max(0.0, until - time.monotonic()))
