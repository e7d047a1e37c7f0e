"""What Gorgon knows of a provider, apart from how its SDK is called."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from gorgon_common.operations.dimensions import Dimension
from gorgon_common.operations.effects import Effect

if TYPE_CHECKING:
    from gorgon_common.settings import Settings

Amounts = Mapping[str, float]
"""Dimension → amount per period; `concurrency`: calls in flight."""
Table = Mapping[str, Amounts]
"""Pattern of a model (or of a method) → amounts; the first pattern that matches applies."""


@dataclass(frozen=True, slots=True)
class Models:
    """The models of a provider.

    `tiers` and `aliases`: a tier (fast, standard, strong) or a short name → the name in the API.  `pattern`: matches
    the beginning of names that belong to this provider even without a prefix.  `prices`: the provider's key in the
    price table.
    """

    tiers: Mapping[str, str]
    aliases: Mapping[str, str]
    pattern: re.Pattern[str]
    prices: str


@dataclass(frozen=True, slots=True)
class Server:
    """Where a provider is called, and with which credential.

    `host`: the domain of its own servers; the limits of its tiers apply only there.  `key_setting` and `url_setting`
    name fields of Settings; `key_variable` and `url_variable` are the environment variables behind them.
    `keyless`: whether a compatible server may need no key.  `sandbox_path`: what follows the address of the sandbox.
    `example`: a base URL, for messages.  `headers`: how the names of the headers begin that report limits.
    """

    host: str
    key_setting: str
    key_variable: str
    url_setting: str
    url_variable: str
    keyless: bool = False
    sandbox_path: str = ""
    example: str = ""
    headers: tuple[str, ...] = ()

    def key(self, settings: Settings) -> str | None:
        """Return the key that is set, None if none is."""
        key = getattr(settings, self.key_setting)
        return None if key is None else str(key.get_secret_value())

    def url(self, settings: Settings) -> str | None:
        """Return the base URL that is set, None for the provider's own."""
        url: str | None = getattr(settings, self.url_setting)
        return url

    def official(self, settings: Settings) -> bool:
        """Return whether the provider's own server is called; a compatible server has limits of its own."""
        return (urlsplit(self.url(settings) or "").hostname or self.host).endswith(self.host)


@dataclass(frozen=True, slots=True)
class Provider:
    """One provider: everything that is not the code of its adapter.

    `title` is its name in messages.  `client`: what makes its calls, as `module:class`; loading it imports the SDK.
    `tier`: the one that is assumed, of `tiers`.  `sandbox`: the limits that the sandbox has by default.  `operations`:
    effect → names, separated by spaces.  `step_types`: the types of its steps in the older format.
    """

    name: str
    title: str
    queue: str
    dimensions: tuple[Dimension, ...] = ()
    tier: str = ""
    tiers: Mapping[str, Table] = field(default_factory=dict)
    sandbox: Amounts = field(default_factory=dict)
    models: Models | None = None
    server: Server | None = None
    client: str = ""
    operations: Mapping[Effect, str] = field(default_factory=dict)
    step_types: tuple[str, ...] = ()

    def amounts(self, tier: str, model: str) -> Amounts:
        """Return what a tier gives a model; none if no pattern matches.  Raises KeyError for an unknown tier."""
        return next((amounts for pattern, amounts in self.tiers[tier].items() if fnmatchcase(model, pattern)), {})
