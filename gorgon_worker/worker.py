"""`gorgon worker`: a Celery worker process with a threads pool that serves some of the queues."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from celery import Celery
from celery.apps import worker as celery_worker
from celery.signals import setup_logging, worker_ready, worker_shutting_down

from gorgon_common import lazy, logs, metrics, telemetry
from gorgon_common.bootstrap import Services, build
from gorgon_common.canvas.celery import THREADS_PER_SLOT, queue_name
from gorgon_common.cli import terminal
from gorgon_common.settings import Settings, get_settings
from gorgon_worker.assembly import make_runtime
from gorgon_worker.metrics_server import MetricsServer
from gorgon_worker.runtime import Runtime
from gorgon_worker.tasks import register

log = logs.get_logger(__name__)


def main(*, queues: Sequence[str], slots: int, target: str, events: bool, metrics_port: int | None) -> None:
    """Serve queues until the process is told to stop; a warm stop lets steps under way end.

    `events`: send the events that Flower shows, and obey remote control.  `metrics_port`: serve Prometheus metrics
    there; None for nowhere.  Raises ConfigurationError, Unavailable.
    """
    settings = get_settings()
    observe(settings)
    figures = None if metrics_port is None else MetricsServer(settings, metrics_port)
    try:
        services = build(settings, events=events)
        runtime = runtime_of(services, queues=queues, slots=slots, target=target)
        if figures is not None:
            figures.start()
            _tell(settings, f"Metrics at {figures.url}", "worker.metrics", url=figures.url)
        served = [queue_name(queue, target) for queue in sorted({*queues, "control"})]
        name = f"{'-'.join(queues) if len(queues) <= 3 else 'all'}-{os.getpid()}@{socket.gethostname()}"
        arguments = [
            "--quiet",
            "worker",
            "--pool=threads",
            f"--concurrency={slots * THREADS_PER_SLOT}",
            f"--queues={','.join(served)}",
            f"--hostname={name}",
            "--without-gossip",
            "--without-mingle",
            f"--loglevel={settings.log_level}",
        ]
        attach(services.app, runtime, queues=served)
        try:
            services.app.worker_main([*arguments, "--task-events"] if events else [*arguments, "--without-heartbeat"])
        finally:
            runtime.close()
            services.close()
    finally:
        if figures is not None:
            figures.close()
        metrics.close()


def observe(settings: Settings) -> None:
    """Set up the logs of this process, Celery's included, and let what happens be counted and logged."""
    logs.configure(settings.log_level, settings.log_format)
    telemetry.subscribe(logs.record)
    telemetry.subscribe(metrics.record)
    # Celery leaves alone what is set up where somebody listens to this signal.
    setup_logging.connect(_is_set_up, weak=False)
    if settings.log_format == "json":
        celery_worker.safe_say = _say


def runtime_of(services: Services, *, queues: Sequence[str], slots: int, target: str) -> Runtime:
    """Return the runtime of a worker process for runs that any worker may take."""
    settings = services.settings
    sandbox = settings.sandbox_url or f"http://127.0.0.1:{settings.sandbox_port}"
    runtime = make_runtime(services, queues=queues, slots=slots, target=target, home="", sandbox_url=sandbox)
    lazy.preload(name for name in ("openai", "anthropic") if name in queues)
    return runtime


def attach(app: Celery, runtime: Runtime, *, queues: Sequence[str]) -> None:
    """Make an application's worker run its tasks on a runtime, and start and stop that with itself."""
    register(app, runtime)

    @worker_ready.connect(weak=False)
    def _ready(**_: object) -> None:
        runtime.start()
        _tell_ready(runtime, queues)

    @worker_shutting_down.connect(weak=False)
    def _stopping(**_: object) -> None:
        runtime.machine.closing = True


def _tell_ready(runtime: Runtime, queues: Sequence[str]) -> None:
    slots, target = runtime.machine.slots, runtime.member.target
    where = "the real providers" if target == "live" else "the sandbox"
    text = f"Gorgon worker on {where}, {slots} slots, queues {', '.join(queues)}: ready."
    _tell(runtime.services.settings, text, "worker.ready", queues=list(queues), slots=slots, target=target)


def _tell(settings: Settings, text: str, event: str, **fields: Any) -> None:
    """Tell people, or machines: where logs are JSON lines there is nothing else on stderr."""
    if settings.log_format == "json":
        log.always(event, **fields)
    else:
        terminal.note(text)


def _is_set_up(**_: object) -> None:
    """Logging is set up already."""


def _say(message: str, _stream: object = None) -> None:
    """Log what Celery would print: logs are JSON lines and nothing else."""
    log.always(message)
