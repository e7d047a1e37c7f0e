"""One descriptor per provider.  A new provider is a file here, an entry below, and its adapter."""

from __future__ import annotations

from collections.abc import Mapping

from gorgon_common import queues
from gorgon_common.operations.dimensions import DAY, Dimension
from gorgon_common.operations.effects import Effect
from gorgon_common.operations.providers.anthropic import ANTHROPIC
from gorgon_common.operations.providers.descriptor import Models, Provider, Server
from gorgon_common.operations.providers.github import GITHUB
from gorgon_common.operations.providers.gmail import GMAIL
from gorgon_common.operations.providers.notion import NOTION
from gorgon_common.operations.providers.openai import OPENAI
from gorgon_common.operations.providers.slack import SLACK

__all__ = [
    "DAILY",
    "DEFAULT_MODEL_PROVIDER",
    "DIMENSIONS",
    "MODEL_PROVIDERS",
    "PROVIDERS",
    "SERVERS",
    "Models",
    "Provider",
    "Server",
    "dimensions_of",
    "models_of",
    "provider_of_model",
]

# What a request or a tool does is known to its author alone, so both count as writes until the step says otherwise.
HTTP = Provider("http", "HTTP", queues.HTTP, operations={Effect.WRITE: "request"})
MCP = Provider("mcp", "MCP", queues.HTTP, operations={Effect.WRITE: "call"})

PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider for provider in (OPENAI, ANTHROPIC, GITHUB, NOTION, GMAIL, SLACK, HTTP, MCP)
}
"""Name → descriptor."""
MODEL_PROVIDERS: tuple[str, ...] = tuple(name for name, provider in PROVIDERS.items() if provider.models is not None)
DEFAULT_MODEL_PROVIDER = ANTHROPIC.name
"""The provider of a step if nothing names one."""
DIMENSIONS: frozenset[str] = frozenset(
    dimension.name for provider in PROVIDERS.values() for dimension in provider.dimensions
)
"""The name of everything that some provider counts."""
DAILY: frozenset[str] = frozenset(
    dimension.name for provider in PROVIDERS.values() for dimension in provider.dimensions if dimension.period >= DAY
)
"""Those that may be used up for the rest of a day."""


SERVERS: Mapping[str, Server] = {
    name: provider.server for name, provider in PROVIDERS.items() if provider.server is not None
}
"""Provider → where it is called; those that are called through a client."""


def dimensions_of(name: str) -> tuple[Dimension, ...]:
    """Return what a provider counts; nothing for an unknown one."""
    provider = PROVIDERS.get(name)
    return provider.dimensions if provider is not None else ()


def provider_of_model(model: str) -> str | None:
    """Return the provider whose models have such a name, None if the name does not tell."""
    for name in MODEL_PROVIDERS:
        if models_of(name).pattern.match(model):
            return name
    return None


def models_of(name: str) -> Models:
    """Return the models of a model provider.  Raises KeyError for any other."""
    models = PROVIDERS[name].models
    if models is None:
        raise KeyError(name)
    return models
