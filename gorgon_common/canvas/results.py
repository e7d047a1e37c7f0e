"""The result store on Redis: it counts the parts of chords, and that is all anybody wants of it."""

from __future__ import annotations

from typing import Any

from celery.backends.redis import RedisBackend


class Counts(RedisBackend):  # type: ignore[misc]  # celery has no types
    """Redis as a result store, without the subscriptions by which Celery waits for results.

    Nobody waits for results here.  Celery's own store would subscribe to each part of a group or chord that it sends,
    and a sender of chords would keep those subscriptions for as long as it lives.
    """

    def on_task_call(self, producer: Any, task_id: str) -> None:
        """Nobody waits for the result."""

    def add_pending_result(self, result: Any, weak: bool = False, start_drainer: bool = True) -> Any:
        """Nobody waits for the result."""
        return result

    def add_pending_results(self, results: Any, weak: bool = False) -> Any:
        """Nobody waits for the results."""
        return list(results)

    def remove_pending_result(self, result: Any) -> Any:
        """Nobody has waited for the result."""
        return result
