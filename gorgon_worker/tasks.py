"""The tasks: a thin layer between Celery's messages and the machine.

A task returns when all work that its message led to has ended, so that a chain continues and a chord counts it.  A
message whose steps had all ended before it arrived returns immediately.  A message that finds its steps pending or
running elsewhere is ignored: this copy of its canvas ends here, and the engine's own counters continue.
"""

from __future__ import annotations

import json
from typing import Any

from celery import Celery
from celery.exceptions import Ignore

from gorgon_common import messages
from gorgon_common.logs import get_logger
from gorgon_worker.runtime import Runtime

log = get_logger(__name__)


def register(app: Celery, runtime: Runtime) -> None:
    """Bind the tasks of an application to a runtime."""
    for name in messages.TASKS:
        _register(app, runtime, name)


def _register(app: Celery, runtime: Runtime, name: str) -> None:
    fast = name in messages.FAST

    @app.task(name=name, bind=True, typing=False, shared=False, ignore_result=True)
    def serve(self: Any, *args: Any, **kwargs: Any) -> None:
        ids, sent = _payload(args, kwargs)
        request = self.request
        counts = bool(request.chord or request.chain or request.callbacks)
        queue = (request.delivery_info or {}).get("routing_key") or ""
        if not runtime.serve(ids, sent, queue, fast=fast, counts=counts):
            raise Ignore


def _payload(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[int], float]:
    """Return the ids and the time of a message.  Foreign or forged messages are dropped, never executed."""
    ids, sent = args if len(args) == 2 and not kwargs else (None, None)
    if (
        isinstance(ids, list)
        and 0 < len(ids) <= 1000
        and all(type(key) is int and 0 < key < 1 << 63 for key in ids)
        and isinstance(sent, (int, float))
    ):
        return ids, float(sent)
    log.warning("a message that is not ours was dropped", shown=json.dumps(args, default=str)[:200])
    raise Ignore
