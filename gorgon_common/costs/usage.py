"""The usage of one call to a model, in the provider-neutral form that prices and the ledger use."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one or more calls.

    `input_tokens` counts every input token, cached ones included (OpenAI's convention; the Anthropic adapter adds the
    cache reads and writes to its own count).  `reasoning_tokens` are part of `output_tokens`.
    """

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{name: getattr(self, name) + getattr(other, name) for name in self.__slots__})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class CallRecord:
    """One call to a model, for the ledger: failed calls, repairs and refusals too.

    `ordinal` counts the calls of one conversation from 1.  `cost_micro` is in micro-dollars, None where it is unknown:
    the model has no price, or the connection broke before anybody said what was used.  `outcome` is `ok`, `invalid`
    (the reply missed its schema, was cut off or too large), `cancelled`, or the `kind` of the error (refused,
    rate_limited, timeout, …).
    """

    provider: str
    model: str
    role: str | None
    ordinal: int
    usage: Usage
    cost_micro: int | None
    price_version: str
    latency_ms: int
    outcome: str
    request_id: str | None = None
    service_tier: str | None = None
    reserved: bool = False
    """Budgets hold a reservation for the call, which this record settles."""
    measured: bool = True
    """False: nobody knows what was used."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dict, `usage` as a dict in it."""
        return asdict(self)
