"""One request to the limiter carries what the threads of a process ask and report at the same time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gorgon_common.engine.group_commit import GroupCommit
from gorgon_common.engine.limits import Answer, Ask, Grant, Limiter, Settlement

MOST = 64
PATIENCE = 0.003
"""How long a request waits for those of the calls that began with it (seconds)."""


class BatchedLimiter:
    """A `Limiter` that groups the requests of a process.  A single request goes through without delay."""

    def __init__(self, inner: Limiter) -> None:
        self._inner = inner
        self._requests: GroupCommit[Ask | tuple[Grant, Settlement], Answer | None] = GroupCommit(
            self._decided, most=MOST, patience=lambda: PATIENCE
        )

    @property
    def waiting(self) -> int:
        """How many requests wait for the one under way."""
        return self._requests.waiting

    def acquire(self, ask: Ask) -> Answer:
        """Reserve everything that the call needs, or nothing."""
        answer = self._requests.do(ask)
        assert answer is not None
        return answer

    def acquire_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Decide several requests."""
        return self._inner.acquire_many(asks)

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Report the outcome of a call."""
        self._requests.do((grant, settlement))

    def settle_many(self, settlements: Sequence[tuple[Grant, Settlement]]) -> None:
        """Report the outcomes of several calls."""
        self._inner.settle_many(settlements)

    def extend(self, grants: Sequence[Grant]) -> int:
        """Extend the leases of calls in flight."""
        return self._inner.extend(grants)

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every recently used gate."""
        return self._inner.snapshot()

    def close(self) -> None:
        """Release the connections."""
        self._inner.close()

    def _decided(self, batch: Sequence[Ask | tuple[Grant, Settlement]]) -> list[Answer | None]:
        # Settlements first: what they give back may serve the requests beside them.
        ended = [item for item in batch if not isinstance(item, Ask)]
        if len(ended) == 1:
            self._inner.settle(*ended[0])
        elif ended:
            self._inner.settle_many(ended)
        asks = [item for item in batch if isinstance(item, Ask)]
        if not asks:
            return [None] * len(batch)
        answers = iter([self._inner.acquire(asks[0])] if len(asks) == 1 else self._inner.acquire_many(asks))
        return [next(answers) if isinstance(item, Ask) else None for item in batch]
