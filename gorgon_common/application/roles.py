"""The roles that agents can have, and the models that they run on.  Needs no database."""

from __future__ import annotations

from collections.abc import Sequence

from gorgon_common import lazy
from gorgon_common.costs.usage import Usage
from gorgon_common.roles import catalogue, models

load_roles = catalogue.load_roles
"""Return the roles by name; `find` also knows their aliases."""
known_models = models.known_models
"""Return the models of a provider that Gorgon knows."""
model_providers = models.model_providers
"""Return the names of the providers of models."""
resolve_model = models.resolve_model
"""Return the full name of a model for a tier or a short name."""


def is_priced(providers: Sequence[str], model: str) -> bool:
    """Return whether the price table has a model of one of the providers, including past ones."""
    pricer = lazy.load("gorgon_common.costs.prices:make_pricer")(None)
    return any(pricer.price(provider, model, Usage(input_tokens=1000)) is not None for provider in providers)


def how_to_price(provider: str, model: str) -> str:
    """Return how a person gives a price to a model that has none."""
    told: str = lazy.load("gorgon_common.costs.prices:how_to_price")(provider, model)
    return told
