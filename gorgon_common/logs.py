"""Logs: structlog, for people or as JSON lines, always on stderr, with the run and the step they are about.

    log = get_logger(__name__)
    with context(run_id=run, step_id=step):
        log.info("claimed", attempt=2)

structlog is imported by the first line that is logged.  Until `configure` is called warnings and errors are shown.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from gorgon_common import lazy

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_context: ContextVar[dict[str, Any]] = ContextVar("gorgon_log_context", default={})  # noqa: B039  never changed, only replaced
_MASK = "********"
_SHORTEST_SECRET = 6  # hiding every "a" would say more than it hides


class _State:
    """What `configure` set, for loggers that begin later."""

    threshold = _LEVELS["warning"]
    configured = False


class Logger:
    """Writes events with fields.  Costs a comparison where its level is off."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def debug(self, event: str, **fields: Any) -> None:
        """Log what only helps to find a fault."""
        self._write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log what normally happens."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log what somebody should look at some time."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log what somebody has to mend."""
        self._write("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log an error with the traceback of the exception in hand."""
        self._write("error", event, {**fields, "exc_info": True})

    def _write(self, level: str, event: str, fields: dict[str, Any]) -> None:
        if _LEVELS[level] >= _State.threshold:
            if not _State.configured:
                configure()
            getattr(lazy.load("structlog").get_logger(), level)(event, logger=self._name, **fields)


def get_logger(name: str) -> Logger:
    """Return the logger of a module."""
    return Logger(name)


@contextmanager
def context(**fields: Any) -> Iterator[None]:
    """Add fields to every line logged inside, in this thread."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def configure(
    level: str = "warning", form: str = "console", *, stream: TextIO | None = None, secrets: Iterable[str] = ()
) -> None:
    """Set up logging for this process, other libraries' included.

    `form` is `console` or `json`; `stream` is stderr by default; `secrets` are values to hide wherever they appear.
    """
    structlog = lazy.load("structlog")
    target = stream or sys.stderr
    hidden = tuple(secret for secret in secrets if len(secret) >= _SHORTEST_SECRET)
    processors: list[Any] = [
        _add_context,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
        structlog.processors.format_exc_info,
    ]
    if form == "json":
        processors.append(structlog.processors.JSONRenderer(default=str))
    else:
        processors.append(structlog.dev.ConsoleRenderer(colors=target.isatty()))
    if hidden:
        processors.append(_masker(hidden))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Forward)]:
        root.removeHandler(handler)
    root.addHandler(_Forward())
    root.setLevel(_LEVELS[level])
    _State.threshold, _State.configured = _LEVELS[level], True


class _Forward(logging.Handler):
    """Sends what other libraries log the same way."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on as an event."""
        fields: dict[str, Any] = {"logger": record.name}
        if record.exc_info:
            fields["exc_info"] = record.exc_info
        lazy.load("structlog").get_logger().log(record.levelno, record.getMessage(), **fields)


def _add_context(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in _context.get().items():
        event.setdefault(name, value)
    return event


def _masker(secrets: tuple[str, ...]) -> Any:
    def mask(_logger: Any, _method: str, line: str) -> str:
        for secret in secrets:
            line = line.replace(secret, _MASK)
        return line

    return mask
