"""The model providers, each created at its first use, because an SDK takes up to two seconds to import."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from gorgon_common.errors import ConfigurationError, ProviderError
from gorgon_common.lazy import load, preload
from gorgon_common.operations.providers import PROVIDERS, SERVERS

if TYPE_CHECKING:
    from gorgon_common.engine.ports import AgentProvider
    from gorgon_common.settings import Settings

CLIENTS = {name: PROVIDERS[name].client for name in SERVERS}
"""Provider, which is also the name of its queue → what makes its calls; loading it imports its SDK."""
SANDBOX_KEY = "sandbox"
"""An API key that the sandbox accepts."""


class AgentProviders(Mapping[str, "AgentProvider"]):
    """Provider name → provider.  Thread-safe; looking one up imports its SDK the first time."""

    def __init__(self, options: Mapping[str, Mapping[str, Any]]) -> None:
        self._options = options
        self._made: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __getitem__(self, name: str) -> AgentProvider:
        provider: AgentProvider = self._get(name)
        return provider

    def __iter__(self) -> Iterator[str]:
        return iter(self._options)

    def __len__(self) -> int:
        return len(self._options)

    def _get(self, name: str) -> Any:
        options = self._options[name]
        if name not in self._made:
            kind = load(CLIENTS[name])  # not under the lock: no thread should wait for the import of the other SDK
            with self._lock:
                if name not in self._made:
                    self._made[name] = kind(**options)
        return self._made[name]

    def problems(self, names: Iterable[str]) -> list[ProviderError]:
        """Return problems that would fail every call to these providers (a missing key), for checks before a run."""
        found = (self._get(name).problem() for name in dict.fromkeys(names) if name in self._options)
        return [problem for problem in found if problem is not None]

    def close(self) -> None:
        """Release the connections of the providers that were used."""
        with self._lock:
            made = list(self._made.values())
        for provider in made:
            provider.close()


def agent_providers(target: str, settings: Settings, *, sandbox_url: str | None = None) -> AgentProviders:
    """Return the providers for runs of this target.

    `live`: keys and URLs of the settings.  `sandbox`: the sandbox at `sandbox_url`, else at `settings.sandbox_url`.
    A missing key is no error here but of each call (and of `problems`).  Raises ConfigurationError for another target,
    or where it is not known where the sandbox is.
    """
    if target == "live":
        return AgentProviders(
            {
                name: {"api_key": server.key(settings), "base_url": server.url(settings)}
                for name, server in SERVERS.items()
            }
        )
    if target != "sandbox":
        raise ConfigurationError(f"There is no target {target!r}.", hint="Use live or sandbox.")
    url = (sandbox_url or settings.sandbox_url or "").rstrip("/")
    if not url:
        raise ConfigurationError(
            "The address of the sandbox is not known.", hint="Start `gorgon sandbox` and set GORGON_SANDBOX_URL."
        )
    return AgentProviders(
        {
            name: {"api_key": SANDBOX_KEY, "base_url": url + server.sandbox_path, "sandbox": True}
            for name, server in SERVERS.items()
        }
    )


def preload_providers(names: Iterable[str]) -> threading.Thread:
    """Import what calls to these providers need (SDKs, prices, validation) in a background thread."""
    wanted = [CLIENTS[name] for name in names if name in CLIENTS]
    return preload([*wanted, *(("jsonschema.validators", "referencing", "genai_prices.data") if wanted else ())])
