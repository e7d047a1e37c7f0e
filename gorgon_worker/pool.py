"""The threads that serve messages: Celery's thread pool, but one that stops in bounded time."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from celery.concurrency.thread import TaskPool

STOP_SECONDS = 2.0


class ThreadPool(TaskPool):  # type: ignore[misc]  # celery has no types
    """The stock pool waits for every running call when it stops, however long that takes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Celery's current application is thread-local: without it chains and chords go to a default broker.
        self.executor = ThreadPoolExecutor(
            self.limit, thread_name_prefix="gorgon-task", initializer=self.app.set_current
        )

    def on_stop(self) -> None:
        """Take nothing more, and wait for at most STOP_SECONDS."""
        self.executor.shutdown(wait=False, cancel_futures=True)
        self.join(STOP_SECONDS)

    def join(self, seconds: float) -> None:
        """Wait until every thread has sent what follows from its message, at most so long."""
        until = time.monotonic() + seconds
        for thread in list(self.executor._threads):
            thread.join(max(0.0, until - time.monotonic()))
