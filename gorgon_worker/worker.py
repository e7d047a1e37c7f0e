"""`gorgon worker`: a Celery worker process with a thread pool that serves some of the queues.

The first SIGTERM or SIGINT is a warm stop: the worker takes no new work, and steps that it holds may end within the
grace period.  Steps that have not ended by then are given back for other workers.  The process exits by the end of the
grace period whatever hangs; an unresponsive database or broker must not keep it alive.  A second signal exits
immediately.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Sequence
from types import FrameType
from typing import Any

import celery.apps.worker  # not `app.worker_main`, which imports Celery's command line: 9 MB
from celery import Celery
from celery.exceptions import CPendingDeprecationWarning
from celery.signals import setup_logging, worker_ready, worker_shutting_down
from celery.worker import state

from gorgon_common import lazy, logs, metrics, telemetry
from gorgon_common.bootstrap import Services, build
from gorgon_common.canvas.celery import THREADS_PER_SLOT, queue_name
from gorgon_common.cli import terminal
from gorgon_common.settings import Settings, get_settings
from gorgon_worker.metrics_server import MetricsServer
from gorgon_worker.pool import STOP_SECONDS, ThreadPool
from gorgon_worker.providers import CLIENTS
from gorgon_worker.runtime import Runtime
from gorgon_worker.tasks import register
from gorgon_worker.wiring import make_runtime

CLOSE_SECONDS = 5.0
"""Time allowed for giving back steps, the lease and connections."""
CLOSE_SHARE = 0.2
"""Share of the grace period reserved for that, if CLOSE_SECONDS would be more."""

log = logs.get_logger(__name__)


class Stop:
    """Ends the process within the grace period (seconds) after the first signal, and immediately on the second."""

    def __init__(self, runtime: Runtime, grace: float) -> None:
        self._runtime = runtime
        self._grace = grace
        self._asked = threading.Event()
        self._closed = threading.Event()
        self.code = 0
        """The process's exit code: 1 if steps had to be given back."""
        # It does not need the main thread, which may hang in its connection to the broker.
        threading.Thread(target=self._carry_out, name="gorgon-stop", daemon=True).start()

    def install(self) -> None:
        """Install the signal handlers in place of Celery's; must be called in the main thread."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._signalled)

    def finish(self) -> None:
        """Start the stop unless it was already requested, and wait until it is complete."""
        self._asked.set()
        self._closed.wait()

    def _signalled(self, number: int, _frame: FrameType | None) -> None:
        if self._asked.is_set():
            os._exit(128 + number)
        self._runtime.machine.closing = True
        state.should_stop = 0  # Celery's loop checks it
        self._asked.set()

    def _carry_out(self) -> None:
        self._asked.wait()
        until = time.monotonic() + self._grace
        machine = self._runtime.machine
        held = len(machine.held)
        if held:
            log.warning(
                "told to stop: what runs may end; a second signal ends it at once", steps=held, seconds=self._grace
            )
        if not machine.drain(self._grace - min(CLOSE_SECONDS, CLOSE_SHARE * self._grace)):
            self.code = 1
        threading.Thread(target=self._close, name="gorgon-close", daemon=True).start()
        now = time.monotonic()
        time.sleep(min(max(until - now, STOP_SECONDS), CLOSE_SECONDS))  # the process has ended by then, or it hangs
        log.warning("the worker ends without having closed its connections: something does not answer")
        os._exit(self.code)

    def _close(self) -> None:
        self._runtime.close(0)
        self._closed.set()


class _Worker(celery.apps.worker.Worker):  # type: ignore[misc]  # celery has no types
    def __init__(self, runtime: Runtime, stop: Stop, **options: object) -> None:
        self._runtime = runtime
        self._stop = stop
        super().__init__(**options)

    def install_platform_tweaks(self, worker: object) -> None:
        """Replace Celery's handlers, which would ignore a second SIGTERM and wait forever on the first."""
        super().install_platform_tweaks(worker)
        self._stop.install()

    def on_consumer_ready(self, consumer: object) -> None:
        """Called when the worker is listening."""
        super().on_consumer_ready(consumer)
        self._runtime.start()
        gc.collect()
        gc.freeze()  # what is loaded by now stays: a full collection would visit a hundred thousand objects in vain
        _tell_ready(self._runtime, sorted(self.app.amqp.queues.consume_from))


def main(*, queues: Sequence[str], slots: int, target: str, events: bool, metrics_port: int | None) -> None:
    """Serve queues until the process is stopped; exits with 1 if steps had to be given back.

    `events`: send the events that Flower displays, and accept remote control.  `metrics_port`: serve Prometheus metrics
    on this port; None disables it.  Raises ConfigurationError, Unavailable.
    """
    settings = get_settings()
    # Celery warns about a change in its next version whenever the broker is unavailable.
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
    observe(settings)
    figures = None if metrics_port is None else MetricsServer(settings, metrics_port)
    services = build(settings, events=events)
    runtime = runtime_of(services, queues=queues, slots=slots, target=target)
    register(services.app, runtime)
    if figures is not None:
        figures.start()
        _tell(settings, f"Metrics at {figures.url}", "worker.metrics", url=figures.url)
    stop = Stop(runtime, settings.grace_seconds)
    worker = _worker(services.app, runtime, stop, queues, slots, target, settings.log_level, events=events)
    try:
        worker.start()
    finally:
        stop.finish()
        worker.pool.join(STOP_SECONDS)
        services.close()
        if figures is not None:
            figures.close()
        metrics.close()
    if stop.code or worker.exitcode:
        logging.shutdown()
        os._exit(stop.code or worker.exitcode)  # the interpreter would wait for the threads of released steps


def observe(settings: Settings) -> None:
    """Set up this process's logs, including Celery's, and count and log its events."""
    logs.configure(settings.log_level, settings.log_format)
    telemetry.subscribe(logs.record)
    telemetry.subscribe(metrics.record)
    # Celery does not touch logging if this signal has a receiver.
    setup_logging.connect(_is_set_up, weak=False)
    if settings.log_format == "json":
        celery.apps.worker.safe_say = _say


def runtime_of(services: Services, *, queues: Sequence[str], slots: int, target: str) -> Runtime:
    """Return the runtime of a worker process for runs that any worker may take."""
    settings = services.settings
    sandbox = settings.sandbox_url or f"http://127.0.0.1:{settings.sandbox_port}"
    runtime = make_runtime(services, queues=queues, slots=slots, target=target, home="", sandbox_url=sandbox)
    lazy.preload(CLIENTS[name] for name in CLIENTS if name in queues and _is_configured(name, target, settings))
    return runtime


def attach(app: Celery, runtime: Runtime, *, queues: Sequence[str]) -> None:
    """Run the tasks of an application's worker on a runtime that starts and stops with the worker."""
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
    """Write a notice for people, or a log entry for machines: with JSON logs, stderr contains nothing else."""
    if settings.log_format == "json":
        log.always(event, **fields)
    else:
        terminal.note(text)


def _is_set_up(**_: object) -> None:
    """Do nothing; logging is already set up."""


def _say(message: str, _stream: object = None) -> None:
    """Log what Celery would print, so that stderr contains only JSON lines."""
    log.always(message)


def _is_configured(provider: str, target: str, settings: Settings) -> bool:
    """Tell whether calls to a provider are possible; loading an SDK takes up to 40 MB."""
    return target != "live" or bool(
        getattr(settings, f"{provider}_api_key") or getattr(settings, f"{provider}_base_url")
    )


def _worker(
    app: Celery,
    runtime: Runtime,
    stop: Stop,
    queues: Sequence[str],
    slots: int,
    target: str,
    log_level: str,
    *,
    events: bool,
) -> _Worker:
    name = f"{'-'.join(queues) if len(queues) <= 3 else 'all'}-{os.getpid()}@{socket.gethostname()}"
    return _Worker(
        runtime,
        stop,
        app=app,
        pool_cls=ThreadPool,
        concurrency=slots * THREADS_PER_SLOT,
        queues=[queue_name(queue, target) for queue in sorted({*queues, "control"})],
        hostname=name,
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=not events,
        task_events=events,
        quiet=True,
        loglevel=log_level.upper(),
    )
