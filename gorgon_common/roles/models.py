"""Resolves a tier (fast, standard, strong), a short name or a full name to the model's name in the API."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from gorgon_common.errors import NotFound
from gorgon_common.operations.providers import MODEL_PROVIDERS, models_of


def model_providers() -> tuple[str, ...]:
    """Return the names of the providers that have models."""
    return MODEL_PROVIDERS


def resolve_model(provider: str, name_or_tier: str) -> str:
    """Return the model's name in the provider's API.

    A name that is neither a tier nor an alias is returned as it is: compatible servers have models of their own.
    Raises NotFound where there is no such provider.
    """
    names = _names(provider)
    return names.get(name_or_tier, name_or_tier)


def known_models(provider: str) -> tuple[str, ...]:
    """Return every tier, alias and model that the descriptor of this provider names, for suggestions."""
    names = _names(provider)
    return tuple(dict.fromkeys((*names, *names.values())))


@cache
def _names(provider: str) -> Mapping[str, str]:
    if provider not in MODEL_PROVIDERS:
        raise NotFound(f"There is no model provider {provider!r}.", hint=f"Known are {', '.join(MODEL_PROVIDERS)}.")
    models = models_of(provider)
    return {**models.aliases, **models.tiers}
