"""The limiter in Redis: every decision is one call of `limiter.lua`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gorgon_common.engine.limits import DIMENSIONS, Answer, Ask, Grant, LimitKey, Quotas, Settlement, Wait
from gorgon_common.errors import Unavailable
from gorgon_common.ratelimit.costs import reserved
from gorgon_common.ratelimit.results import never, shown

PREFIX = "gorgon:limit:"
TIMEOUT = 1.0
"""The timeout of one request, in seconds."""
_PARTS = ("s", "l", "c", "f", "t", "w", "q", "k")

Value = TypeVar("Value")


class RedisLimiter:
    """`Limiter` for any number of processes.  Raises Unavailable where Redis does not answer within TIMEOUT.

    `worker` names this process.  `lease` is in seconds: a silent process loses its calls in flight.
    `clock_offset` (seconds) moves the clock in tests.
    """

    def __init__(self, url: str, quotas: Quotas, *, worker: str, lease: float = 60.0) -> None:
        self._client = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0)
        )
        text = resources.files(__package__).joinpath("limiter.lua").read_text(encoding="utf-8")
        self._script = self._client.register_script(text)
        self._quotas = quotas
        self._worker = worker
        self._lease = lease
        self.clock_offset = 0.0
        self.seen: dict[LimitKey, tuple[int, tuple[float | None, ...]]] = {}
        """Gate → how many workers use it, and its limits, as of the last grant."""

    def acquire(self, ask: Ask) -> Answer:
        """Reserve everything that the call needs, or nothing."""
        assumed, ceiling = self._quotas.quota(ask.gate)
        cost = reserved(ask)
        reply = self._run(
            ask.gate,
            "acquire",
            ask.id,
            ask.team,
            ask.weight,
            self._lease * 1000,
            self._worker,
            min(assumed.concurrency, ceiling.concurrency),
            ask.ticket or ask.id,
            *(cost[name] for name in DIMENSIONS),
            *(-1 if limit is None else limit for limit in assumed.limits()),
            *(-1 if limit is None else limit for limit in ceiling.limits()),
        )
        kind, *rest = [part.decode() if isinstance(part, bytes) else part for part in reply]
        if kind == "grant":
            limits = tuple(None if float(limit) < 0 else float(limit) for limit in rest[2:])
            self.seen[ask.gate] = (int(rest[0]), limits)
            return Grant(ask.id, ask.gate, float(rest[1]) / 1000)
        if kind == "wait":
            return Wait(float(rest[0]) / 1000, rest[1], float(rest[2]) / 1000)
        return never(rest[0], float(rest[1]), float(rest[2]))

    def acquire_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Decide several requests, one after the other; one answer for each."""
        return [self.acquire(ask) for ask in asks]

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Settle a call.  Only the first settlement counts."""
        signals: list[Any] = []
        for name, signal in settlement.signals.items():
            numbers = (signal.limit, signal.remaining, None if signal.resets is None else signal.resets * 1000)
            signals += [DIMENSIONS.index(name) + 1, *(-1 if n is None else n for n in numbers), int(signal.absolute)]
        after = settlement.retry_after
        self._run(
            grant.gate,
            "settle",
            grant.id,
            settlement.outcome,
            -1 if after is None else after * 1000,
            *(settlement.used.get(name, -1) for name in DIMENSIONS),
            *signals,
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
        return sum(int(self._run(gate, "extend", self._lease * 1000, *ids)) for gate, ids in gates.items())

    def debit(self, gate: LimitKey, used: Mapping[str, float]) -> None:
        """Deduct what this process has used while Redis was unavailable, by dimension."""
        self._run(gate, "debit", *(used.get(name, 0.0) for name in DIMENSIONS))

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every gate that was used recently."""
        found = self._ask(lambda: sorted(self._client.scan_iter(match=f"{PREFIX}*:s", count=1000)))
        gates = []
        for key in found:
            account, _, model = key.decode().removeprefix(f"{PREFIX}{{").removesuffix(":s").partition("}:")
            target, provider, name = account.split(":", 2)
            gate = LimitKey(target, provider, name, model)
            gates.append(shown(gate, json.loads(self._run(gate, "snapshot"))))
        return gates

    def close(self) -> None:
        """Release connections."""
        self._client.close()

    def _run(self, gate: LimitKey, operation: str, *arguments: Any) -> Any:
        account = f"{PREFIX}{{{gate.target}:{gate.provider}:{gate.account}}}"
        keys = [*(f"{account}:{gate.model}:{part}" for part in _PARTS), f"{account}::a"]
        return self._ask(lambda: self._script(keys=keys, args=[operation, self.clock_offset * 1000, *arguments]))

    def _ask(self, question: Callable[[], Value]) -> Value:
        try:
            return question()
        except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError, OSError) as error:
            raise Unavailable(
                f"The limiter's Redis cannot be used: {error}", hint="Check GORGON_REDIS_URL, and that it is running."
            ) from error
