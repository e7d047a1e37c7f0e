"""The limiter of a worker: the shared one, and a local one with lower limits while that is unavailable."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from gorgon_common.engine.limits import (
    DIMENSIONS,
    UNREACHABLE,
    Answer,
    Ask,
    Grant,
    LimitKey,
    Quota,
    Quotas,
    Settlement,
    Wait,
)
from gorgon_common.errors import Unavailable
from gorgon_common.logs import get_logger
from gorgon_common.ratelimit.costs import reserved
from gorgon_common.ratelimit.local import Memory, StoredLimiter
from gorgon_common.ratelimit.redis import RedisLimiter

PATIENCE = 1.0
"""Seconds after which a worker continues with its own limiter."""
PROBE = 1.0
"""Seconds between two attempts to reach the shared limiter again."""
UNSEEN_WORKERS = 8
"""The number of workers to assume if none was ever counted; high on purpose."""

log = get_logger(__name__)


class SturdyLimiter:
    """`Limiter` that never raises Unavailable and is never unlimited.

    While the shared limiter is unavailable, each worker uses limit ÷ (2 × workers last seen), so that all workers
    together stay at half of the limit.  If the shared limiter comes and goes, capacity must not be counted twice: a
    worker starts with empty buckets and later reports what it used.

    `clock` (monotonic) and `wall` (since 1970) give seconds.
    """

    def __init__(
        self,
        shared: RedisLimiter,
        quotas: Quotas,
        *,
        worker: str,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._shared = shared
        self._clock = clock
        self._lock = threading.Lock()
        self._down: float | None = None
        self._wall = wall
        self._probed = 0.0
        self._took: dict[LimitKey, dict[str, float]] = {}
        """Gate → what was admitted locally, by dimension."""
        self._alone = StoredLimiter(
            Memory(wall), _Known(shared, quotas), worker=worker, scale=self._scale, local=True, lease=600.0
        )

    def acquire(self, ask: Ask) -> Answer:
        """Reserve everything that the call needs, or nothing."""
        if self._try():
            try:
                answer = self._shared.acquire(ask)
            except Unavailable as error:
                self._lost(error)
            else:
                if self._down is not None:
                    self._found()
                return answer
        down = self._down
        waited = 0.0 if down is None else self._clock() - down
        if waited < PATIENCE:
            left = PATIENCE - waited
            return Wait(left, UNREACHABLE, self._wall() + left)
        answer = self._alone.acquire(ask)
        if isinstance(answer, Grant):
            self._note(ask)
        return answer

    def acquire_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Decide several requests, one after the other; one answer for each."""
        return [self.acquire(ask) for ask in asks]

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Settle a call.  A lost settlement is corrected by the headers of later replies."""
        if grant.local:
            self._alone.settle(grant, settlement)
            return
        if not self._try():
            return
        try:
            self._shared.settle(grant, settlement)
        except Unavailable as error:
            self._lost(error)
        else:
            if self._down is not None:
                self._found()

    def settle_many(self, settlements: Sequence[tuple[Grant, Settlement]]) -> None:
        """Settle several calls."""
        for grant, settlement in settlements:
            self.settle(grant, settlement)

    def extend(self, grants: Sequence[Grant]) -> int:
        """Extend the leases of calls in flight; returns how many still had theirs."""
        held = self._alone.extend([grant for grant in grants if grant.local])
        shared = [grant for grant in grants if not grant.local]
        if shared and self._down is None:
            try:
                held += self._shared.extend(shared)
            except Unavailable as error:
                self._lost(error)
        return held

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every gate that was used recently.  Raises Unavailable."""
        return self._shared.snapshot()

    def close(self) -> None:
        """Release connections."""
        self._shared.close()

    def _try(self) -> bool:
        """Return whether to ask the shared limiter: always while it is available, else once a second as a probe."""
        with self._lock:
            if self._down is None:
                return True
            now = self._clock()
            if now - self._probed < PROBE:
                return False
            self._probed = now
            return True

    def _lost(self, error: Unavailable) -> None:
        with self._lock:
            self._probed = self._clock()
            if self._down is not None:
                return
            self._down = self._clock()
        self._alone.drain()
        log.warning("the limiter cannot be reached: this worker keeps to a part of each limit", error=error.message)

    def _note(self, ask: Ask) -> None:
        with self._lock:
            took = self._took.setdefault(ask.gate, {})
            for name, cost in reserved(ask).items():
                took[name] = took.get(name, 0.0) + cost

    def _found(self) -> None:
        with self._lock:
            was, self._down = self._down, None
            took, self._took = self._took, {}
        if was is not None:
            log.warning("the limiter can be reached again")
        try:
            for gate, used in took.items():
                self._shared.debit(gate, used)
        except Unavailable as error:
            self._lost(error)

    def _scale(self, gate: LimitKey) -> float:
        workers, _ = self._shared.seen.get(gate, (UNSEEN_WORKERS, ()))
        return 1.0 / (2 * max(1, workers))


class _Known:
    """The quotas that the shared limiter reported last, else the configured ones."""

    def __init__(self, shared: RedisLimiter, quotas: Quotas) -> None:
        self._shared = shared
        self._quotas = quotas

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        """Return (assumed, ceiling)."""
        assumed, ceiling = self._quotas.quota(gate)
        known = self._shared.seen.get(gate)
        if known is not None:
            limits: dict[str, Any] = dict(zip(DIMENSIONS, known[1], strict=True))
            assumed = replace(assumed, **limits)
        return assumed, ceiling
