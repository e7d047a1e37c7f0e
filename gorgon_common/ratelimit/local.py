"""The limiter without Redis: the decisions of `gate`, the state in a store of documents."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from gorgon_common.engine.limits import Answer, Ask, Grant, LimitKey, Quotas, Settlement, Wait
from gorgon_common.ratelimit.costs import reserved
from gorgon_common.ratelimit.decisions import LimiterState, State, fresh
from gorgon_common.ratelimit.results import never, shown

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


class StoredLimiter:
    """`Limiter` on documents.  `scale()`: the fraction of every limit that may be used.  Raises what the store raises.

    `lease` is in seconds.
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
    ) -> None:
        self._documents = documents
        self._quotas = quotas
        self._worker = worker
        self._lease = lease
        self._scale = scale
        self._local = local

    def acquire(self, ask: Ask) -> Answer:
        """Reserve everything that the call needs, or nothing."""
        assumed, ceiling = self._quotas.quota(ask.gate)
        scale = self._scale(ask.gate)
        seats = max(1, int(min(assumed.concurrency, ceiling.concurrency) * scale))
        answer = self._with(
            ask.gate,
            lambda keeper: keeper.acquire(
                ask.id,
                ticket=ask.ticket or ask.id,
                team=ask.team,
                weight=ask.weight,
                lease=self._lease * 1000,
                worker=self._worker,
                seats=seats,
                cost=reserved(ask),
                given=assumed.limits(),
                ceilings=ceiling.limits(),
            ),
        )
        kind, *rest = answer
        if kind == "grant":
            return Grant(ask.id, ask.gate, rest[1] / 1000, local=self._local)
        if kind == "wait":
            return Wait(rest[0] / 1000, rest[1], rest[2] / 1000)
        return never(rest[0], rest[1], rest[2])

    def acquire_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Decide several requests, one after the other; one answer for each."""
        return [self.acquire(ask) for ask in asks]

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Settle a call.  Only the first settlement counts."""
        signals = {
            name: (
                signal.limit,
                signal.remaining,
                None if signal.resets is None else signal.resets * 1000,
                signal.absolute,
            )
            for name, signal in settlement.signals.items()
        }
        after = settlement.retry_after
        self._with(
            grant.gate,
            lambda keeper: keeper.settle(
                grant.id,
                outcome=settlement.outcome,
                after=None if after is None else after * 1000,
                used=settlement.used,
                signals=signals,
            ),
        )

    def settle_many(self, settlements: Sequence[tuple[Grant, Settlement]]) -> None:
        """Settle several calls."""
        for grant, settlement in settlements:
            self.settle(grant, settlement)

    def extend(self, grants: Sequence[Grant]) -> int:
        """Extend the leases of calls in flight; returns how many still had theirs."""
        gates: dict[LimitKey, list[str]] = {}
        for grant in grants:
            gates.setdefault(grant.gate, []).append(grant.id)
        return sum(self._with(gate, self._extending(ids)) for gate, ids in gates.items())

    def _extending(self, ids: list[str]) -> Callable[[LimiterState], int]:
        return lambda keeper: keeper.extend(ids, self._lease * 1000)

    def debit(self, gate: LimitKey, used: Mapping[str, float]) -> None:
        """Deduct what was used without the limiter, by dimension."""
        self._with(gate, lambda keeper: keeper.debit(used))

    def drain(self) -> None:
        """Empty the buckets of every gate."""
        for gate in self._gates():
            self._with(gate, LimiterState.drain)

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every gate that was used recently."""
        return [shown(gate, self._with(gate, LimiterState.snapshot)) for gate in self._gates()]

    def close(self) -> None:
        """Do nothing: the store belongs to its owner."""

    def _gates(self) -> list[LimitKey]:
        parts = [key.split(":", 3) for key in sorted(self._documents.keys())]
        return [LimitKey(*names) for names in parts if len(names) == 4]

    def _with(self, gate: LimitKey, decide: Callable[[LimiterState], Value]) -> Value:
        def work(documents: list[Any], now: float) -> Value:
            state: State = documents[0] or fresh()
            account: State = documents[1] or {}
            result = decide(LimiterState(state, account, now * 1000, scale=self._scale(gate)))
            documents[:] = [state, account]
            return result

        return self._documents.change([str(gate), f"{gate.target}:{gate.provider}:{gate.account}"], work)
