"""The limiter in Redis: the requests about one key are one call of `limiter.lua`, several keys one round trip."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from typing import Any, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gorgon_common.engine.limits import LimitKey, Quotas
from gorgon_common.errors import Unavailable
from gorgon_common.operations.dimensions import Dimension
from gorgon_common.operations.providers import dimensions_of
from gorgon_common.ratelimit.limiter import DecidingLimiter
from gorgon_common.ratelimit.wire import Request

PREFIX = "gorgon:limit:2:"
"""With the version of the state: another version is left to expire, and the keys start with one second's worth."""
SCRIPT = ("limiter.lua", "acquire.lua", "settle.lua")
"""The parts of the script, in order: a script in Redis is one text."""
TIMEOUT = 1.0
"""The timeout of one request, in seconds."""

Value = TypeVar("Value")


class RedisLimiter(DecidingLimiter):
    """`Limiter` for any number of processes.  Raises Unavailable where Redis does not answer within TIMEOUT.

    `clock_offset` (seconds) moves the clock in tests.
    """

    def __init__(
        self,
        url: str,
        quotas: Quotas,
        *,
        worker: str,
        lease: float = 60.0,
        dimensions: Callable[[str], Sequence[Dimension]] = dimensions_of,
    ) -> None:
        super().__init__(quotas, worker=worker, lease=lease, dimensions=dimensions)
        self._client = redis.Redis.from_url(
            url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, retry=Retry(NoBackoff(), 0)
        )
        folder = resources.files(__package__)
        texts = [folder.joinpath(name).read_text(encoding="utf-8") for name in SCRIPT]
        self._script = self._client.register_script("\n".join(texts))
        self.clock_offset = 0.0

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every key that was used recently."""
        found = self._ask(lambda: sorted(self._client.scan_iter(match=f"{PREFIX}*}}:*:state", count=1000)))
        gates = []
        for key in found:
            account, _, model = key.decode().removeprefix(f"{PREFIX}{{").removesuffix(":state").partition("}:")
            target, provider, name = account.split(":", 2)
            gates.append(LimitKey(target, provider, name, model))
        return self._shown(gates)

    def close(self) -> None:
        """Release connections."""
        self._client.close()

    def _decide(self, batches: Mapping[LimitKey, Sequence[Request]]) -> Mapping[LimitKey, Sequence[Any]]:
        calls = [(self._keys(gate), self._arguments(requests)) for gate, requests in batches.items()]
        replies = self._ask(lambda: self._evaluate(calls))
        return dict(zip(batches, map(json.loads, replies), strict=True))

    def _evaluate(self, calls: Sequence[tuple[list[str], list[str]]]) -> list[Any]:
        if len(calls) == 1:
            return [self._script(keys=keys, args=arguments) for keys, arguments in calls]
        with self._client.pipeline(transaction=False) as pipeline:
            for keys, arguments in calls:
                pipeline.evalsha(self._script.sha, len(keys), *keys, *arguments)
            replies = pipeline.execute(raise_on_error=False)
        for number, reply in enumerate(replies):
            if isinstance(reply, redis.exceptions.NoScriptError):  # nothing was done: Redis has lost the script
                keys, arguments = calls[number]
                replies[number] = self._script(keys=keys, args=arguments)
            elif isinstance(reply, Exception):
                raise reply
        return replies

    def _keys(self, gate: LimitKey) -> list[str]:
        # The braces keep the keys of an account in one slot of a cluster.
        account = f"{PREFIX}{{{gate.target}:{gate.provider}:{gate.account}}}"
        return [
            f"{account}:{gate.model}:state",
            f"{account}::account",
            f"{account}:{gate.model}:waiting",
            f"{account}:{gate.model}:places",
        ]

    def _arguments(self, requests: Sequence[Request]) -> list[str]:
        return [repr(self.clock_offset * 1000), json.dumps(requests, separators=(",", ":"))]

    def _ask(self, question: Callable[[], Value]) -> Value:
        try:
            return question()
        except (redis.ConnectionError, redis.TimeoutError, redis.exceptions.ReadOnlyError, OSError) as error:
            raise Unavailable(
                f"The limiter's Redis cannot be used: {error}", hint="Check GORGON_REDIS_URL, and that it is running."
            ) from error
