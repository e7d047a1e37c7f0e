"""The composition root: turns settings into wired services.  The only module that knows every adapter.

What is done with them is in `application`, for the command line and the API, and in `gorgon_worker`, for workers.
"""

from __future__ import annotations

import os
import socket
from typing import Any
from urllib.parse import urlsplit

from gorgon_common import lazy
from gorgon_common.canvas.celery import CeleryCanvas, make_app
from gorgon_common.engine.context import RunCache
from gorgon_common.engine.limits import Limiter
from gorgon_common.engine.publish import Publisher
from gorgon_common.engine.sweep import Sweep
from gorgon_common.errors import GorgonError
from gorgon_common.home import protect
from gorgon_common.ids import new_id
from gorgon_common.persistence import migrate
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.database import Database
from gorgon_common.persistence.limits import LimitRules, LimitStates
from gorgon_common.persistence.reports import Reports
from gorgon_common.persistence.store import Store
from gorgon_common.persistence.views import Views
from gorgon_common.ratelimit.local import StoredLimiter
from gorgon_common.ratelimit.quotas import QuotaBook, Rule, read_limits
from gorgon_common.settings import Settings

TARGETS = ("live", "sandbox")
"""Where the calls of a run go."""

_OFFICIAL = "openai.com"
_OFFICIALS = (_OFFICIAL, "anthropic.com")
"""Servers to which the tiers' limits apply; a compatible server has limits of its own."""


class Services:
    """The stores, caches and publishers of one process, wired for its settings.  Thread-safe.

    `events`: send the task events that Flower shows.  `app`: an existing Celery application.
    """

    def __init__(self, settings: Settings, database: Database, *, events: bool = False, app: Any = None) -> None:
        self.settings = settings
        self.database = database
        self.store = Store(database, poison_deaths=settings.poison_deaths)
        self.budgets = Budgets(database)
        self.limit_rules = LimitRules(database)
        self.knowledge = RunCache(self.store)
        self.views = Views(database, self.knowledge.plan)
        self.reports = Reports(database, self.knowledge.plan)
        self._broker = _broker(settings)
        self.app = app or make_app(self._broker, events=events)
        self._canvases: dict[str, CeleryCanvas] = {}
        self._publishers: dict[tuple[str, str], Publisher] = {}

    def canvas(self, target: str) -> CeleryCanvas:
        """Return the canvas that creates and sends the messages for runs of a target."""
        if target not in self._canvases:
            self._canvases[target] = CeleryCanvas(self.app, self._broker, target)
        return self._canvases[target]

    def publisher(self, target: str, home: str) -> Publisher:
        """Return the publisher for steps of runs of a target and home; there is one of each per process."""
        key = (target, home)
        if key not in self._publishers:
            self._publishers[key] = Publisher(self.store, self.knowledge, self.canvas(target), target=target, home=home)
        return self._publishers[key]

    def sweeps(self) -> list[Sweep]:
        """Return the sweeps of runs that any worker may take.  The API runs them too, so they do not need a live
        worker.
        """
        return [
            Sweep(
                self.store,
                self.knowledge,
                self.publisher(target, ""),
                self.canvas(target),
                name=new_id("sweep"),
                home="",
            )
            for target in TARGETS
        ]

    def close(self) -> None:
        """Release connections."""
        for canvas in self._canvases.values():
            canvas.close()
        self.app.close()
        self.budgets.close()
        self.store.close()


def _broker(settings: Settings) -> str:
    """Return the broker's URL; each embedded application has a broker of its own."""
    return f"gmem://{new_id('app').lower()}" if settings.embedded else settings.broker_url


def quota_book(settings: Settings, database: Database) -> QuotaBook:
    """Return the configured quotas.  Raises ConfigurationError if GORGON_LIMITS_FILE is invalid."""
    rules = LimitRules(database)
    theirs = {"openai": settings.openai_base_url, "anthropic": settings.anthropic_base_url}
    return QuotaBook(
        read_limits(settings.limits_file),
        stored=lambda: [Rule(*entry) for entry in rules.all()],
        official=lambda provider: (urlsplit(theirs.get(provider) or "").hostname or _OFFICIAL).endswith(_OFFICIALS),
    )


def make_limiter(settings: Settings, database: Database) -> tuple[Limiter, QuotaBook]:
    """Return this process's limiter, in Redis if there is one, and the quotas it applies.

    Raises ConfigurationError if GORGON_LIMITS_FILE is invalid.
    """
    book = quota_book(settings, database)
    worker = f"{socket.gethostname()}:{os.getpid()}:{new_id('lim')}"
    if settings.redis_url is None:
        return StoredLimiter(LimitStates(database), book, worker=worker), book
    shared = lazy.load("gorgon_common.ratelimit.redis:RedisLimiter")(settings.redis_url, book, worker=worker)
    return lazy.load("gorgon_common.ratelimit.failover:SturdyLimiter")(shared, book, worker=worker), book


def build(settings: Settings, *, events: bool = False, app: Any = None) -> Services:
    """Wire the services for these settings.  The database is migrated if it is SQLite, and checked if it is PostgreSQL.

    `events`: send the task events that Flower shows.  `app`: an existing Celery application.  Raises
    ConfigurationError, Unavailable.
    """
    settings.register_secrets()
    protect(settings.home, make="database_url" not in settings.model_fields_set)
    if settings.database_url.startswith("sqlite"):
        migrate.upgrade(settings.database_url)
    database = Database(settings.database_url)
    try:
        migrate.check(database)
    except GorgonError:
        database.close()
        raise
    return Services(settings, database, events=events, app=app)
