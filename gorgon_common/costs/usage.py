"""What one call to a model used, in the provider-neutral form that prices and the ledger work with."""

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
