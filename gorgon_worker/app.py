"""The Celery application for Celery's own commands: `celery -A gorgon_worker.app worker|status|inspect|events|flower`.

It is configured by Gorgon's settings (GORGON_REDIS_URL …).  Its worker serves the queues of the sandbox, or those given
with `-Q`: `-Q openai,control` are queues of the real provider, `-Q sandbox.openai,sandbox.control` of the sandbox.
"""

from __future__ import annotations

from typing import Any, NoReturn

from celery.signals import celeryd_init, worker_shutdown
from kombu import Exchange, Queue

from gorgon_common import metrics, queues
from gorgon_common.bootstrap import build
from gorgon_common.canvas.celery import THREADS_PER_SLOT, make_app, queue_name
from gorgon_common.cli import terminal
from gorgon_common.errors import ConfigurationError, GorgonError
from gorgon_common.settings import get_settings
from gorgon_worker.worker import attach, observe, runtime_of

_SANDBOX = "sandbox."
_QUEUES = [queue_name(name, "sandbox") for name in queues.ALL]

settings = get_settings()
if settings.embedded:
    raise ConfigurationError(
        "Celery's commands need a broker that others can reach.",
        hint="Set GORGON_REDIS_URL, for example to redis://127.0.0.1:6379/0.",
    )
app = make_app(settings.broker_url, events=True)
app.conf.update(
    worker_pool="threads",
    worker_concurrency=settings.slots * THREADS_PER_SLOT,
    task_queues=[Queue(name, Exchange(name), routing_key=name) for name in _QUEUES],
)


@celeryd_init.connect(weak=False)
def begin(options: dict[str, Any], **_: object) -> None:
    """Attach a runtime to a starting worker.  Exits if the worker's options do not suit Gorgon."""
    named = options.get("queues") or _QUEUES
    named = named.split(",") if isinstance(named, str) else list(named)
    targets = {"sandbox" if name.startswith(_SANDBOX) else "live" for name in named}
    served = [name.removeprefix(_SANDBOX) for name in named]
    unknown = sorted(set(served) - set(queues.ALL))
    if unknown:
        _refuse(f"There is no queue {unknown[0]!r}; there are {', '.join(queues.ALL)}, each also as sandbox.NAME.")
    if len(targets) > 1:
        _refuse("A worker serves the real providers' queues or the sandbox's, not both.")
    if queues.CONTROL not in served:
        _refuse(f"Every worker serves the queue `control` as well: -Q {','.join([*named, _control(targets)])}")
    if "thread" not in str(options.get("pool_cls") or options.get("pool") or "threads"):
        _refuse("Gorgon's workers run steps in threads: leave -P out, or write -P threads.")
    observe(settings)
    try:
        services = build(settings, app=app)
        slots = max(1, int(options.get("concurrency") or app.conf.worker_concurrency) // THREADS_PER_SLOT)
        runtime = runtime_of(services, queues=served, slots=slots, target=targets.pop())
    except GorgonError as error:
        _refuse(f"{error.message} {error.hint}".strip())
    attach(app, runtime, queues=named)

    @worker_shutdown.connect(weak=False)
    def _end(**_: object) -> None:
        runtime.close(5.0)
        services.close()
        metrics.close()


def _control(targets: set[str]) -> str:
    return queue_name(queues.CONTROL, next(iter(targets)))


def _refuse(message: str) -> NoReturn:
    # Celery logs exceptions of signal receivers and continues; SystemExit ends the process.
    terminal.note(message)
    raise SystemExit(terminal.EXIT_BAD_INPUT)
