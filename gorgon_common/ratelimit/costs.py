"""The cost of a call in each dimension: what is reserved, and what was used."""

from __future__ import annotations

from collections.abc import Iterable

from gorgon_common.costs.usage import Usage
from gorgon_common.engine.limits import Ask
from gorgon_common.operations.dimensions import Counts, Dimension
from gorgon_common.operations.providers import dimensions_of


def reserved(ask: Ask, dimensions: Iterable[Dimension]) -> dict[str, float]:
    """Return what is reserved for a call, by dimension; only what its labels name, where a dimension has labels."""
    return {
        dimension.name: _reserved(ask, dimension)
        for dimension in dimensions
        if not dimension.per or dimension.per in ask.labels
    }


def _reserved(ask: Ask, dimension: Dimension) -> float:
    match dimension.counts:
        case Counts.CALLS:
            return 1.0
        case Counts.TOKENS:
            return float(max(ask.tokens_in, ask.tokens_out))
        case Counts.INPUT | Counts.UNCACHED_INPUT:
            return float(ask.tokens_in)
        case Counts.OUTPUT:
            return float(ask.tokens_out)
        case Counts.OPERATION:
            return float(dimension.cost_of(ask.operation, ask.effect))


def used(provider: str, usage: Usage) -> dict[str, float]:
    """Return what a call has used in the dimensions of its provider that count tokens."""
    amounts = {
        Counts.TOKENS: usage.input_tokens + usage.output_tokens,
        Counts.INPUT: usage.input_tokens,
        Counts.UNCACHED_INPUT: max(0, usage.input_tokens - usage.cache_read_tokens),
        Counts.OUTPUT: usage.output_tokens,
    }
    return {
        dimension.name: float(amounts[dimension.counts])
        for dimension in dimensions_of(provider)
        if dimension.counts in amounts
    }
