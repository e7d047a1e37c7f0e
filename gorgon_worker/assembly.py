"""What a worker process is made of: providers, commands and prices for a target, around one runtime."""

from __future__ import annotations

from collections.abc import Sequence

from gorgon_common.bootstrap import Services
from gorgon_common.costs.prices import make_pricer
from gorgon_worker.providers import agent_providers
from gorgon_worker.providers.command import LocalCommands
from gorgon_worker.runtime import Runtime


def make_runtime(
    services: Services, *, queues: Sequence[str], slots: int, target: str, home: str, sandbox_url: str | None = None
) -> Runtime:
    """Wire a runtime.  Raises ConfigurationError where the target is not known or has no address."""
    settings = services.settings
    providers = agent_providers(target, settings, sandbox_url=sandbox_url)
    return Runtime(
        services,
        queues=queues,
        slots=slots,
        target=target,
        home=home,
        providers=providers,
        close_providers=providers.close,
        commands=LocalCommands(settings.commands_allow),
        pricer=make_pricer(settings.prices),
    )
