"""`gorgon worker`: a Celery worker process with a threads pool that serves some of the queues."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from celery.signals import worker_ready, worker_shutting_down

from gorgon_common import lazy
from gorgon_common.bootstrap import build
from gorgon_common.canvas.celery import THREADS_PER_SLOT, queue_name
from gorgon_common.settings import get_settings
from gorgon_worker.assembly import make_runtime
from gorgon_worker.tasks import register


def main(*, queues: Sequence[str], slots: int, target: str) -> None:
    """Serve queues until the process is told to stop; a warm stop lets steps under way end.

    Raises ConfigurationError, Unavailable.
    """
    settings = get_settings()
    services = build(settings)
    sandbox = settings.sandbox_url or f"http://127.0.0.1:{settings.sandbox_port}"
    runtime = make_runtime(services, queues=queues, slots=slots, target=target, home="", sandbox_url=sandbox)
    app = services.app
    register(app, runtime)
    lazy.preload(name for name in ("openai", "anthropic") if name in queues)

    @worker_ready.connect(weak=False)
    def _ready(**_: object) -> None:
        runtime.start()

    @worker_shutting_down.connect(weak=False)
    def _stopping(**_: object) -> None:
        runtime.machine.closing = True

    served = [queue_name(queue, target) for queue in sorted({*queues, "control"})]
    name = f"{'-'.join(queues) if len(queues) <= 3 else 'all'}-{os.getpid()}@{socket.gethostname()}"
    try:
        app.worker_main(
            [
                "worker",
                "--pool=threads",
                f"--concurrency={slots * THREADS_PER_SLOT}",
                f"--queues={','.join(served)}",
                f"--hostname={name}",
                "--without-gossip",
                "--without-mingle",
                "--without-heartbeat",
                f"--loglevel={settings.log_level}",
            ]
        )
    finally:
        runtime.close()
        services.close()
