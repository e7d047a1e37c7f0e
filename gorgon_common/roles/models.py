"""Resolves a tier (fast, standard, strong), a short name or a full name to the model's name in the API."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

from gorgon_common.documents import read_data
from gorgon_common.errors import NotFound


@cache
def _table() -> Mapping[str, Mapping[str, Mapping[str, str]]]:
    text = resources.files(__package__).joinpath("models.yaml").read_text(encoding="utf-8")
    table: dict[str, Any] = read_data(text, file="models.yaml")
    return table


def model_providers() -> tuple[str, ...]:
    """Return the names of the providers that have models."""
    return tuple(_table())


def resolve_model(provider: str, name_or_tier: str) -> str:
    """Return the model's name in the provider's API.

    A name that is neither a tier nor an alias is returned as it is: compatible servers have models of their own.
    Raises NotFound where there is no such provider.
    """
    names = _names(provider)
    return names.get(name_or_tier, name_or_tier)


def known_models(provider: str) -> tuple[str, ...]:
    """Return every tier, alias and model that models.yaml names for this provider, for suggestions."""
    names = _names(provider)
    return tuple(dict.fromkeys((*names, *names.values())))


@cache
def _names(provider: str) -> Mapping[str, str]:
    entry = _table().get(provider)
    if entry is None:
        raise NotFound(f"There is no model provider {provider!r}.", hint=f"Known are {', '.join(_table())}.")
    return {**entry["aliases"], **entry["tiers"]}
