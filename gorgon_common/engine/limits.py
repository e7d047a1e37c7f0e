"""The rate limiter's interface for the engine and the workers: requests, answers and settlements.

A *gate* is one model of one provider account: `target:provider:account:model`.  A caller asks to pass a gate and
receives a grant, a time to retry, or a definite refusal.  Each grant is settled once, with the actual usage and the
limits that the provider reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

DIMENSIONS = ("requests", "requests_per_day", "tokens", "input_tokens", "output_tokens")
"""What a quota counts, per minute except for requests per day.  `tokens`: input and output together (OpenAI)."""

SECONDS = {name: 86_400.0 if name == "requests_per_day" else 60.0 for name in DIMENSIONS}

RETRY_AFTER, BREAKER, CONCURRENCY, TURN, UNREACHABLE = "retry_after", "breaker", "concurrency", "turn", "unreachable"
"""Why a call waits, besides a dimension: the provider asked for a pause; most of the recent calls failed; the maximum
number of calls is in flight; other calls are ahead; the limiter itself is unreachable.
"""

OK, RATE_LIMITED, OVERLOADED, FAILED, NEUTRAL = "ok", "rate_limited", "overloaded", "failed", "neutral"
"""How a call ended: success; 429; 529; a timeout, 5xx or broken connection; anything else (4xx, cancelled)."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a gate may use.  None: no known limit.  `concurrency`: calls in flight."""

    requests: float | None = None
    requests_per_day: float | None = None
    tokens: float | None = None
    input_tokens: float | None = None
    output_tokens: float | None = None
    concurrency: int = 64

    def limits(self) -> tuple[float | None, ...]:
        """Return the limits in the order of DIMENSIONS."""
        return (self.requests, self.requests_per_day, self.tokens, self.input_tokens, self.output_tokens)


@dataclass(frozen=True, slots=True)
class LimitKey:
    """The limiter's key for a call.  `account` identifies the provider account without revealing its API key."""

    target: str
    provider: str
    account: str
    model: str

    def __str__(self) -> str:
        return f"{self.target}:{self.provider}:{self.account}:{self.model}"


@dataclass(frozen=True, slots=True)
class Ask:
    """A request to make one call.

    `id` identifies the call: repeating the request with the same id is not charged twice.  `ticket` identifies the
    waiting caller, which keeps its place when it asks again (the call itself if empty).  `tokens_in` is an estimate,
    `tokens_out` the maximum for the reply.  `weight`: the team's share relative to other teams'.
    """

    id: str
    gate: LimitKey
    tokens_in: int = 0
    tokens_out: int = 0
    team: str = "default"
    weight: float = 1.0
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """The call may be made now.  It must be settled, whatever its outcome."""

    id: str
    gate: LimitKey
    at: float = 0.0
    """Seconds since 1970, by the limiter's clock."""
    local: bool = False
    """Granted by this process alone, because the shared limiter is unreachable."""


@dataclass(frozen=True, slots=True)
class Wait:
    """The call has to wait: retry in `seconds`, at `until` (seconds since 1970, by the limiter's clock).

    `why`: a dimension, or RETRY_AFTER, BREAKER, CONCURRENCY, TURN (another team's or an earlier call's), UNREACHABLE.
    """

    seconds: float
    why: str
    until: float


@dataclass(frozen=True, slots=True)
class Never:
    """Waiting cannot help: the call needs more of `dimension` than the entire limit."""

    why: str
    dimension: str
    cost: float
    limit: float


Answer = Grant | Wait | Never


@dataclass(frozen=True, slots=True)
class Signal:
    """What the provider's headers report about one dimension; None where they report nothing.

    `resets` is in seconds: from the time the call was granted, or from now if `absolute`.
    """

    limit: float | None = None
    remaining: float | None = None
    resets: float | None = None
    absolute: bool = False


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a call ended.

    `used`: tokens by dimension; a missing dimension counts as reserved.  `retry_after` is in seconds, None if the
    provider did not report it.
    """

    outcome: str = OK
    used: Mapping[str, float] = field(default_factory=dict)
    signals: Mapping[str, Signal] = field(default_factory=dict)
    retry_after: float | None = None


class Limiter(Protocol):
    """Decides which calls to a provider may be made, across all processes; thread-safe."""

    def acquire(self, ask: Ask) -> Answer:
        """Reserve everything that the call needs, or nothing."""
        ...

    def acquire_many(self, asks: Sequence[Ask]) -> list[Answer]:
        """Decide several requests, one after the other, in one round trip where possible; one answer for each."""
        ...

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Report the outcome of a call.  Only the first report counts."""
        ...

    def settle_many(self, settlements: Sequence[tuple[Grant, Settlement]]) -> None:
        """Report the outcomes of several calls, in one round trip where possible."""
        ...

    def extend(self, grants: Sequence[Grant]) -> int:
        """Extend the leases of calls that are still in flight; returns how many still had theirs."""
        ...

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every recently used gate, for `gorgon limits ls`."""
        ...

    def close(self) -> None:
        """Release the connections."""
        ...


class Quotas(Protocol):
    """The configured limits of each gate."""

    def quota(self, gate: LimitKey) -> tuple[Quota, Quota]:
        """Return (limits assumed until the provider reports its own, limits that apply regardless of its reports)."""
        ...
