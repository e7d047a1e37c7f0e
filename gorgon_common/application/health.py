"""Whether the database and the broker can be reached, and how much work is queued."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gorgon_common import metrics, persistence, queues
from gorgon_common.bootstrap import TARGETS, Services
from gorgon_common.errors import GorgonError
from gorgon_common.home import protect
from gorgon_common.persistence import migrate
from gorgon_common.settings import Settings


def check(services: Services) -> dict[str, Any]:
    """Return `{database: {ok, detail}, broker: {ok, detail}}`."""

    def database() -> str:
        migrate.check(services.database)
        return services.database.engine.url.render_as_string(hide_password=True)

    return {"database": _checked(database), "broker": _checked(services.canvas("live").health)}


def measure(services: Services) -> None:
    """Set the gauges of queued work and of workers, for `metrics.watch`."""
    try:
        waiting = services.store.shelved()
        slots = {target: services.store.slots(target, "") for target in TARGETS}
    except GorgonError:
        return  # the gauges keep their values
    for number, queue in enumerate(queues.ALL):
        metrics.BACKLOG.set(waiting.get(number, 0), queue=queue)
        for target, live in slots.items():
            metrics.SLOTS.set(live.get(number, 0), target=target, queue=queue)


def upgrade_database(settings: Settings) -> None:
    """Create the tables, or bring them up to date.  Raises ConfigurationError, Unavailable."""
    protect(settings.home, make="database_url" not in settings.model_fields_set)
    persistence.upgrade(settings.database_url)


def _checked(check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"ok": True, "detail": check()}
    except GorgonError as error:
        return {"ok": False, "detail": error.message, "hint": error.hint or None}
