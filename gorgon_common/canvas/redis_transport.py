"""Kombu's Redis transport, which junk in a queue does not stop.

The stock one raises what it meets in the middle of its event loop, and the worker ends: one line that anybody pushed
into a queue would take down every worker, one after the other.
"""

from __future__ import annotations

from typing import Any

from kombu.transport import TRANSPORT_ALIASES
from kombu.transport import redis as stock

from gorgon_common.logs import get_logger

log = get_logger(__name__)


class Channel(stock.Channel):  # type: ignore[misc]  # kombu has no types
    """Drops what is no message, and keeps its client: to make one costs more than most commands (CPU)."""

    _kept: Any = None

    def _create_client(self, asynchronous: bool = False) -> Any:
        if asynchronous:  # tied to one connection of the event loop
            return super()._create_client(asynchronous=True)
        if self._kept is None or self._kept.connection_pool is not self.pool:
            self._kept = super()._create_client()
        return self._kept

    def _brpop_read(self, **options: Any) -> Any:
        # The item has left the queue before it is read, so there is nothing to reject.  Errors of the connection are
        # of other types and go on.
        try:
            return super()._brpop_read(**options)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            log.warning("something that is no message was dropped", error=repr(error)[:300])
            return True


class Transport(stock.Transport):  # type: ignore[misc]  # kombu has no types
    """Used for `redis://`, `rediss://` and `redis+socket://`."""

    Channel = Channel


TRANSPORT_ALIASES.update(dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport"))
