"""`gorgon worker`: checks the options before Celery is imported."""

from __future__ import annotations

from collections.abc import Sequence

from gorgon_common import errors, lazy
from gorgon_common import queues as names
from gorgon_common.settings import get_settings


def worker(
    *,
    queues: Sequence[str] | None,
    slots: int | None,
    live: bool,
    events: bool | None = None,
    metrics_port: int | None = None,
) -> None:
    """Run steps from the broker until stopped."""
    settings = get_settings()
    unknown = [name for name in queues or () if name not in names.ALL]
    if unknown:
        raise errors.InputInvalid(f"There is no queue {unknown[0]!r}.", hint=f"Queues: {', '.join(names.ALL)}.")
    if settings.embedded:
        raise errors.ConfigurationError(
            "A worker needs a broker that others can reach.",
            hint="Set GORGON_REDIS_URL, for example to redis://127.0.0.1:6379/0. `gorgon run` needs none.",
        )
    lazy.load("gorgon_worker.worker:main")(
        queues=list(queues or names.ALL),
        slots=slots or settings.slots,
        target="live" if live else "sandbox",
        events=settings.flower_events if events is None else events,
        metrics_port=settings.metrics_port if metrics_port is None else metrics_port,
    )
