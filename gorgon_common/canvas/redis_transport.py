"""Kombu's Redis transport, made robust against invalid data in a queue.

The original raises the error inside its event loop, which ends the worker: a single invalid entry in a queue would stop
every worker, one after the other.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as stock

from gorgon_common.logs import get_logger

log = get_logger(__name__)


class Channel(stock.Channel):  # type: ignore[misc]  # kombu has no types
    """Drops entries that are not messages, and keeps its client: making one costs more CPU than most commands."""

    _kept: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # tied to one connection of the event loop
            return super()._create_client(asynchronous=True)
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = super()._create_client()
        return self._kept

    def _brpop_read(self, **options: Any) -> Any:
        # The entry has left the queue before it is read, so there is nothing to reject.  Errors of the connection have
        # other types and are raised.
        try:
            return super()._brpop_read(**options)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("something that is no message was dropped", error=repr(error)[:300])
            return True


class Transport(stock.Transport):  # type: ignore[misc]  # kombu has no types
    """Used for `redis://`, `rediss://` and `redis+socket://`."""

    Channel = Channel
    brpop_timeout = 3
    """Seconds for which Redis holds a worker's wait for messages; an answer costs both of them something."""


TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"))
