"""The upper bound of the cost of a call.  It is not an estimate: budgets hold only if no call can exceed it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gorgon_common.costs.usage import Usage

Price = Callable[[Usage], int | None]
"""Micro-dollars of a usage, None where the model has no price."""

TOKENS_PER_MESSAGE = 16
"""Tokens of a turn besides its text (role and separators: the sandbox counts 3, OpenAI 4)."""
TOKENS_PER_CALL = 64
TOKENS_PER_SCHEMA = 512
"""Tokens of the instruction that a provider adds if a reply must fit a schema."""
SCHEMA_FACTOR = 3
"""A schema is sent in the provider's subset: references are put in place, constraints become words."""
LEAST_OUTPUT = 1024
"""To fit a budget, a reply is never limited to fewer tokens than this, unless fewer were requested."""


def input_bound(
    messages: Sequence[str], *, system: str | None = None, schema: Mapping[str, Any] | None = None, images: int = 0
) -> int:
    """Return the most input tokens that a call can have: a token is at least one byte of what is sent.

    `images` in bytes: they are sent in base64 and cost less than one token a byte.
    """
    total = TOKENS_PER_CALL + TOKENS_PER_MESSAGE * (len(messages) + 1) + images
    total += sum(_bytes(text) for text in messages)
    if system:
        total += _bytes(system)
    if schema is not None:
        total += SCHEMA_FACTOR * _bytes(json.dumps(schema, ensure_ascii=False)) + TOKENS_PER_SCHEMA
    return total


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def worst_cost(price: Price, input_tokens: int, output_tokens: int) -> int | None:
    """Return the most that these tokens can cost, in micro-dollars: all input at its highest price.

    None where the model has no price.
    """
    plain = price(Usage(input_tokens=input_tokens, output_tokens=output_tokens))
    if plain is None:
        return None
    others = (
        price(Usage(input_tokens=input_tokens, output_tokens=output_tokens, **{kind: input_tokens}))
        for kind in ("cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens")
    )
    return max([plain, *(cost for cost in others if cost is not None)])


def least_output(max_tokens: int) -> int:
    """Return the lowest limit for a reply: half of the requested tokens, but at least LEAST_OUTPUT."""
    return min(max_tokens, max(LEAST_OUTPUT, max_tokens // 2))


def clamp(
    price: Price, input_tokens: int, max_tokens: int, *, least: int, usd: int | None, tokens: int | None
) -> int | None:
    """Return the most output tokens, from `least` to `max_tokens`, with which a call fits what is left.

    `usd` in micro-dollars; None: no limit.  None where not even the least reply fits.
    """
    low, high = least, max_tokens

    def fits(output: int) -> bool:
        if tokens is not None and input_tokens + output > tokens:
            return False
        if usd is None:
            return True
        cost = worst_cost(price, input_tokens, output)
        return cost is not None and cost <= usd

    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
