from __future__ import annotations

from typing import get_args

import pytest
from anthropic.resources.messages.messages import DEPRECATED_MODELS
from anthropic.types import Model
from openai.types import ChatModel

from gorgon_common.costs.prices import GenaiPricer
from gorgon_common.costs.usage import Usage
from gorgon_common.errors import NotFound
from gorgon_common.roles.catalogue import TIERS
from gorgon_common.roles.models import known_models, model_providers, resolve_model

LISTS = {"openai": get_args(ChatModel), "anthropic": get_args(get_args(Model)[0])}


def test_every_provider_has_every_tier() -> None:
    assert set(model_providers()) == set(LISTS)
    for provider in model_providers():
        models = [resolve_model(provider, tier) for tier in TIERS]
        assert len(set(models)) == len(TIERS)


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_every_model_is_in_the_sdk_and_has_a_price(provider: str) -> None:
    pricer = GenaiPricer()
    for name in known_models(provider):
        model = resolve_model(provider, name)
        assert model in LISTS[provider], name
        assert pricer.price(provider, model, Usage(input_tokens=1000, output_tokens=1000)), name


@pytest.mark.parametrize("provider", ["openai", "anthropic"])
def test_a_stronger_tier_costs_more(provider: str) -> None:
    usage = Usage(input_tokens=10_000, output_tokens=2_000)
    costs = [GenaiPricer().price(provider, resolve_model(provider, tier), usage) for tier in TIERS]
    assert None not in costs
    assert costs == sorted(costs, key=lambda cost: cost or 0)


def test_aliases_and_full_names() -> None:
    assert resolve_model("anthropic", "claude-opus") == "claude-opus-5-5"
    assert resolve_model("openai", "gpt-6") == "gpt-6.1-sol"
    assert resolve_model("openai", "gpt-4.1") == "gpt-4.1"
    assert resolve_model("openai", "llama3.3:70b") == "llama3.3:70b"


def test_an_unknown_provider() -> None:
    with pytest.raises(NotFound, match="gemini"):
        resolve_model("gemini", "fast")


def test_none_of_them_is_about_to_be_shut_down() -> None:
    """The SDK warns of models with a date; a default must not be among them."""
    assert not set(DEPRECATED_MODELS) & {resolve_model("anthropic", name) for name in known_models("anthropic")}
