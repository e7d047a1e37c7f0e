"""A worker inside the process: the same tasks on the same engine, without a broker, signals or a separate process.

A plain `WorkController` in a thread, with its own transport, pool, consumer and result store.  It does not touch the
process's signals, logging or current Celery application, so it works under pytest, in a server and in a notebook.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from celery._state import _set_task_join_will_block
from celery.utils import timer2
from celery.worker import WorkController
from celery.worker.consumer.consumer import Consumer

from gorgon_common.bootstrap import Services
from gorgon_common.canvas.celery import THREADS_PER_SLOT, queue_name
from gorgon_common.errors import Unavailable
from gorgon_worker.pool import ThreadPool
from gorgon_worker.runtime import Runtime
from gorgon_worker.tasks import register
from gorgon_worker.wiring import make_runtime


class _Consumer(Consumer):  # type: ignore[misc]  # celery has no types
    def call_soon(self, function: Any, *args: Any, **options: Any) -> Any:
        """Schedule a call from another thread, and wake the consumer to run it."""
        called = super().call_soon(function, *args, **options)
        transport: Any = getattr(self.connection, "_transport", None)
        if hasattr(transport, "space"):
            transport.space.ring()
        return called


class _Clock(timer2.Timer):  # type: ignore[misc]  # celery has no types
    def stop(self) -> None:
        """Stop immediately: the stock timer may keep sleeping for up to a second."""
        self._Timer__is_shutdown.set()
        with self.not_empty:
            self.not_empty.notify_all()
        super().stop()


class _Worker(WorkController):  # type: ignore[misc]  # celery has no types
    """A WorkController, not celery.apps.worker.Worker, which installs signal handlers and logging."""

    def on_init_blueprint(self) -> None:
        """Called before the components start."""
        self.is_ready = threading.Event()

    def on_consumer_ready(self, consumer: Any) -> None:
        """Called when the consumer is listening."""
        self.is_ready.set()


@contextlib.contextmanager
def embedded(
    services: Services,
    *,
    queues: Sequence[str],
    slots: int,
    home: str,
    target: str,
    sandbox_url: str | None = None,
) -> Iterator[Runtime]:
    """Run the steps of `home` in this process until the context ends, plus at most GORGON_GRACE_SECONDS."""
    runtime = make_runtime(services, queues=queues, slots=slots, target=target, home=home, sandbox_url=sandbox_url)
    app = services.app
    register(app, runtime)
    app.finalize()
    worker = _Worker(
        app=app,
        pool=ThreadPool,
        concurrency=slots * THREADS_PER_SLOT,
        queues=[queue_name(queue, target) for queue in sorted({*queues, "control"})],
        hostname=f"embedded-{runtime.member.owner}@localhost",
        consumer_cls=_Consumer,
        timer_cls=_Clock,
        optimization="fair",
        without_mingle=True,
        without_gossip=True,
        without_heartbeat=True,
        quiet=True,
    )
    thread = threading.Thread(target=worker.start, name="gorgon-embedded", daemon=True)
    thread.start()
    if not worker.is_ready.wait(10):
        raise Unavailable("The embedded worker did not start within 10 s.")
    _set_task_join_will_block(False)  # the pool sets it process-wide, and result.get() would then refuse everywhere
    runtime.start()
    try:
        yield runtime
    finally:
        runtime.close(services.settings.grace_seconds)
        worker.stop()
        thread.join(3)
