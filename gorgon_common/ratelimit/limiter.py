"""The limiter for anything that decides requests: builds the requests and reads the replies."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_common.engine.limits import Answer, Ask, Grant, LimitKey, Quotas, Settlement
from gorgon_common.operations.dimensions import Dimension
from gorgon_common.operations.providers import dimensions_of
from gorgon_common.ratelimit import wire
from gorgon_common.ratelimit.wire import Request


class DecidingLimiter(ABC):
    """`Limiter` whose subclass decides the requests of `wire`.

    `worker` names this process.  `lease` is in seconds: a silent process loses its calls in flight.  `dimensions`:
    provider → what it counts.
    """

    local = False
    """Whether grants are given by this process alone."""

    def __init__(
        self,
        quotas: Quotas,
        *,
        worker: str,
        lease: float = 60.0,
        dimensions: Callable[[str], Sequence[Dimension]] = dimensions_of,
    ) -> None:
        self._quotas = quotas
        self._worker = worker
        self._lease = lease
        self._dimensions = dimensions
        self.seen: dict[LimitKey, tuple[int, Mapping[str, float]]] = {}
        """Key → how many workers use it, and its limits, as of the last grant."""

    @abstractmethod
    def _decide(self, batches: Mapping[LimitKey, Sequence[Request]]) -> Mapping[LimitKey, Sequence[Any]]:
        """Return the replies to the requests about each key, in their order."""

    def _scale(self, gate: LimitKey) -> float:
        """Return the fraction of every limit that may be used."""
        return 1.0

    def acquire(self, ask: Ask) -> Answer:
        """Reserve everything that the call needs, or nothing."""
        return self.acquire_many([ask])[0]

    def acquire_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Decide several requests, one after the other, in one round trip; one answer for each."""
        replies = self._each([(ask.gate, self._request(ask)) for ask in asks])
        for ask, reply in zip(asks, replies, strict=True):
            if reply["kind"] == "grant":
                self.seen[ask.gate] = (int(reply["workers"]), reply["limits"])
        return [wire.answer(ask, reply, local=self.local) for ask, reply in zip(asks, replies, strict=True)]

    def _request(self, ask: Ask) -> Request:
        return wire.acquire(
            ask,
            self._dimensions(ask.gate.provider),
            self._quotas.quota(ask.gate),
            worker=self._worker,
            lease=self._lease,
            scale=self._scale(ask.gate),
        )

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Settle a call.  Only the first settlement counts."""
        self.settle_many([(grant, settlement)])

    def settle_many(self, settlements: Sequence[tuple[Grant, Settlement]]) -> None:
        """Settle several calls in one round trip."""
        self._each([(grant.gate, wire.settle(grant, settlement)) for grant, settlement in settlements])

    def extend(self, grants: Sequence[Grant]) -> int:
        """Extend the leases of calls in flight; returns how many still had theirs."""
        ids: dict[LimitKey, list[str]] = {}
        for grant in grants:
            ids.setdefault(grant.gate, []).append(grant.id)
        lease = self._lease * 1000
        requests = [(gate, {"operation": "extend", "ids": held, "lease": lease}) for gate, held in ids.items()]
        return sum(int(held) for held in self._each(requests))

    def debit(self, gate: LimitKey, used: Mapping[str, float]) -> None:
        """Deduct what a process has used without this limiter, by dimension."""
        self._each([(gate, {"operation": "debit", "used": dict(used)})])

    def reserved(self, ask: Ask) -> dict[str, float]:
        """Return what is reserved for a call, by bucket: what `debit` takes."""
        return {entry["name"]: entry["cost"] for entry in self._request(ask)["dimensions"]}

    def _shown(self, gates: Sequence[LimitKey]) -> list[dict[str, Any]]:
        states = self._each([(gate, {"operation": "snapshot"}) for gate in gates])
        return [
            wire.shown(gate, state, self._dimensions(gate.provider)) for gate, state in zip(gates, states, strict=True)
        ]

    def _each(self, requests: Sequence[tuple[LimitKey, Request]]) -> list[Any]:
        """Return one reply for each request; those about one key are decided together."""
        if not requests:
            return []
        batches: dict[LimitKey, list[Request]] = {}
        for gate, request in requests:
            batches.setdefault(gate, []).append(request)
        replies = {gate: iter(found) for gate, found in self._decide(batches).items()}
        return [next(replies[gate]) for gate, _ in requests]
