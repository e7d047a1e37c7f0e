"""The limiter without Redis: `decisions`, and the state in a store of documents."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from gorgon_common.engine.limits import LimitKey, Quotas
from gorgon_common.operations.dimensions import Dimension
from gorgon_common.operations.providers import dimensions_of
from gorgon_common.ratelimit.buckets import VERSION, fresh
from gorgon_common.ratelimit.decisions import decide
from gorgon_common.ratelimit.limiter import DecidingLimiter
from gorgon_common.ratelimit.wire import Request

Value = TypeVar("Value")


class Documents(Protocol):
    """A store of documents: `persistence.limits` on SQLite, `Memory` in one process."""

    def change(self, keys: Sequence[str], work: Callable[[list[Any], float], Value]) -> Value:
        """Call `work(documents, now)` in one transaction and store the documents that it leaves in the list.

        A document that does not exist is None.  `now`: seconds since 1970 by the store's clock.
        """
        ...

    def keys(self) -> list[str]:
        """Return the keys of all documents."""
        ...


class Memory:
    """Documents in the memory of one process."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._documents: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._clock = clock

    def change(self, keys: Sequence[str], work: Callable[[list[Any], float], Value]) -> Value:
        """Change documents under a lock."""
        with self._lock:
            documents = [self._documents.get(key) for key in keys]
            result = work(documents, self._clock())
            self._documents.update(zip(keys, documents, strict=True))
            return result

    def keys(self) -> list[str]:
        """Return the keys of all documents."""
        with self._lock:
            return list(self._documents)


class StoredLimiter(DecidingLimiter):
    """`Limiter` on documents.  Raises what the store raises.

    `scale()`: the fraction of every limit that may be used.
    """

    def __init__(
        self,
        documents: Documents,
        quotas: Quotas,
        *,
        worker: str,
        lease: float = 60.0,
        scale: Callable[[LimitKey], float] = lambda _: 1.0,
        local: bool = False,
        dimensions: Callable[[str], Sequence[Dimension]] = dimensions_of,
    ) -> None:
        super().__init__(quotas, worker=worker, lease=lease, dimensions=dimensions)
        self._documents = documents
        self._scale_of = scale
        self.local = local

    def drain(self) -> None:
        """Empty the buckets of every key."""
        self._each([(gate, {"operation": "drain"}) for gate in self._gates()])

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every key that was used recently."""
        return self._shown(self._gates())

    def close(self) -> None:
        """Do nothing: the store belongs to its owner."""

    def _scale(self, gate: LimitKey) -> float:
        return self._scale_of(gate)

    def _gates(self) -> list[LimitKey]:
        parts = [key.split(":", 3) for key in sorted(self._documents.keys())]
        return [LimitKey(*names) for names in parts if len(names) == 4]

    def _decide(self, batches: Mapping[LimitKey, Sequence[Request]]) -> Mapping[LimitKey, Sequence[Any]]:
        keys = list(dict.fromkeys(key for gate in batches for key in (str(gate), _account(gate))))

        def work(documents: list[Any], now: float) -> Mapping[LimitKey, Sequence[Any]]:
            known = dict(zip(keys, documents, strict=True))
            replies = {}
            for gate, requests in batches.items():
                state = known[str(gate)]
                if not state or state.get("version") != VERSION:
                    state = known[str(gate)] = fresh()
                account = known[_account(gate)] = known[_account(gate)] or {}
                replies[gate] = decide(state, account, now * 1000, requests, scale=self._scale(gate))
            documents[:] = known.values()
            return replies

        return self._documents.change(keys, work)


def _account(gate: LimitKey) -> str:
    return f"{gate.target}:{gate.provider}:{gate.account}"
