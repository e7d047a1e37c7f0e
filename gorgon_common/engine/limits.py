"""The limiter as the engine and the workers see it: what is asked, what is answered, what is told afterwards.

A *gate* is one model of one provider account: `target:provider:account:model`.  Whoever wants to call it asks, and gets
a grant, a time to come back, or a clear no.  A grant is settled once, with what the call really used and what the
provider said about its limits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

DIMENSIONS = ("requests", "requests_per_day", "tokens", "input_tokens", "output_tokens")
"""What a quota counts; per minute, but for requests per day.  `tokens`: input and output together (OpenAI)."""

SECONDS = {name: 86_400.0 if name == "requests_per_day" else 60.0 for name in DIMENSIONS}

RETRY_AFTER, BREAKER, CONCURRENCY, TURN, UNREACHABLE = "retry_after", "breaker", "concurrency", "turn", "unreachable"
"""Why a call waits, beside a dimension: the provider has asked for a pause; most of the last calls failed; as many are
in flight as may be; other calls are first; the limiter itself is away."""

OK, RATE_LIMITED, OVERLOADED, FAILED, NEUTRAL = "ok", "rate_limited", "overloaded", "failed", "neutral"
"""How a call ended, for the limiter: 429; 529; a timeout, 5xx or broken connection; anything else (4xx, cancelled)."""


@dataclass(frozen=True, slots=True)
class Quota:
    """What a gate may use.  None: no limit is known.  `concurrency`: calls in flight."""

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
class Gate:
    """Where calls go through: `account` names the provider account without giving its key away."""

    target: str
    provider: str
    account: str
    model: str

    def __str__(self) -> str:
        return f"{self.target}:{self.provider}:{self.account}:{self.model}"


@dataclass(frozen=True, slots=True)
class Ask:
    """One call that somebody wants to make.

    `id` is the call's own: asking again with it costs nothing twice.  `ticket` is who waits, and keeps its place when
    it comes again (the call itself where there is none).  `tokens_in` is the estimate, `tokens_out` what the reply may
    have at most.  `weight`: the team's share against other teams'.
    """

    id: str
    gate: Gate
    tokens_in: int = 0
    tokens_out: int = 0
    team: str = "default"
    weight: float = 1.0
    ticket: str = ""


@dataclass(frozen=True, slots=True)
class Grant:
    """The call may be made, now.  Settle it, whatever becomes of it."""

    id: str
    gate: Gate
    at: float = 0.0
    """Seconds since 1970, by the limiter's clock."""
    local: bool = False
    """Given by this process alone, because the shared limiter cannot be reached."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now; come back in `seconds`, at `until` (seconds since 1970, by the limiter's clock).

    `why`: a dimension, or RETRY_AFTER, BREAKER, CONCURRENCY, TURN (another team's or an earlier call's), UNREACHABLE.
    """

    seconds: float
    why: str
    until: float


@dataclass(frozen=True, slots=True)
class Never:
    """No waiting would help: the call needs more of `dimension` than the whole limit."""

    why: str
    dimension: str
    cost: float
    limit: float


Answer = Grant | Wait | Never


@dataclass(frozen=True, slots=True)
class Signal:
    """What the provider's headers say about one dimension; None where they do not.

    `resets` is in seconds: after the call was let in, or with `absolute` from now.
    """

    limit: float | None = None
    remaining: float | None = None
    resets: float | None = None
    absolute: bool = False


@dataclass(frozen=True, slots=True)
class Settlement:
    """How a call ended.

    `used`: tokens by dimension; what is missing counts as reserved.  `retry_after` is in seconds, None where the
    provider did not say.
    """

    outcome: str = OK
    used: Mapping[str, float] = field(default_factory=dict)
    signals: Mapping[str, Signal] = field(default_factory=dict)
    retry_after: float | None = None


class Limiter(Protocol):
    """Decides who may call a provider, for all processes together; thread-safe."""

    def acquire(self, ask: Ask) -> Answer:
        """Reserve everything that the call needs, or nothing."""
        ...

    def settle(self, grant: Grant, settlement: Settlement) -> None:
        """Tell what became of a call.  Only the first time counts."""
        ...

    def extend(self, grants: Sequence[Grant]) -> int:
        """Keep calls that are still under way from losing their leases; returns how many had theirs."""
        ...

    def snapshot(self) -> list[dict[str, Any]]:
        """Return every gate that was used lately, for `gorgon limits ls`."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


class Quotas(Protocol):
    """What each gate may use, by configuration."""

    def quota(self, gate: Gate) -> tuple[Quota, Quota]:
        """Return (what is assumed until the provider says otherwise, what must not be exceeded whatever it says)."""
        ...
