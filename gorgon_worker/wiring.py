"""Assembles a worker process: providers behind the limiter, commands and prices, around one runtime."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from gorgon_common.bootstrap import Services, make_limiter
from gorgon_common.costs.prices import make_pricer
from gorgon_common.costs.tokens import SANDBOX_FACTOR, Calibration, Ratio
from gorgon_common.engine.calls.acquire import CallLimits
from gorgon_common.engine.calls.batched_limiter import BatchedLimiter
from gorgon_common.engine.calls.estimates import Estimates
from gorgon_common.engine.calls.sleep_slots import SleepSlots
from gorgon_common.errors import GorgonError
from gorgon_common.logs import get_logger
from gorgon_common.operations.providers import SERVERS
from gorgon_common.settings import Settings
from gorgon_worker.providers import SANDBOX_KEY, agent_providers
from gorgon_worker.providers.command import LocalCommands
from gorgon_worker.runtime import Runtime
from gorgon_worker.settlements import settlement

log = get_logger(__name__)


def make_runtime(
    services: Services, *, queues: Sequence[str], slots: int, target: str, home: str, sandbox_url: str | None = None
) -> Runtime:
    """Wire a runtime.  Raises ConfigurationError if the target is unknown or has no address."""
    settings = services.settings
    inner = agent_providers(target, settings, sandbox_url=sandbox_url)
    calibration = Calibration(lambda seen: _keep(services, target, seen))
    limiter, book = make_limiter(settings, services.database)
    call_limits = CallLimits(
        limiter=BatchedLimiter(limiter),
        target=target,
        accounts=accounts(target, settings),
        weight=book.weight,
        settlement=settlement,
        estimates=Estimates(
            lambda: services.reports.ratios(target),
            unseen=SANDBOX_FACTOR if target == "sandbox" else 1.0,
            calibration=calibration,
        ),
        sleepers=SleepSlots(max(2, slots // 5), spare=max(1, slots // 10)),
    )

    def close() -> None:
        call_limits.close()
        inner.close()
        calibration.flush()

    return Runtime(
        services,
        queues=queues,
        slots=slots,
        target=target,
        home=home,
        providers=inner,
        limits=call_limits,
        close_providers=close,
        commands=LocalCommands(settings.commands_allow),
        pricer=make_pricer(settings.prices),
    )


def _keep(services: Services, target: str, seen: Mapping[tuple[str, str], Ratio]) -> None:
    """Store the accuracy of token estimates.  Without a database it is lost: no call may fail because of it."""
    try:
        services.reports.add_ratios(target, seen)
    except GorgonError as error:
        log.warning("token estimates were not corrected", error=error.message)


def accounts(target: str, settings: Settings) -> dict[str, str]:
    """Return provider → the account of its key, under a name that does not reveal the key."""
    if target == "sandbox":
        return dict.fromkeys(SERVERS, SANDBOX_KEY)
    return {name: _account(server.key(settings) or "", server.url(settings) or "") for name, server in SERVERS.items()}


def _account(key: str, url: str) -> str:
    return hashlib.sha256(f"{url}\n{key}".encode()).hexdigest()[:10]
