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
from gorgon_common.masking import SECRETS, redact
from gorgon_common.printable import json_safe, single_line, visible

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_context: ContextVar[dict[str, Any]] = ContextVar("gorgon_log_context", default={})  # noqa: B039  never changed, only replaced
_TRACEBACKS = frozenset({"exception", "exc_info", "stack"})
"""Fields of several lines."""


_TRACEBACK = logging.Formatter()


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

    `form` is `console` or `json`; `stream` is stderr by default; `secrets` are values to mask, beside those that
    `masking.SECRETS` knows.  Control characters are shown, and a line feed in a field cannot begin a line of its own.
    """
    structlog = lazy.load("structlog")
    target = stream or sys.stderr
    for secret in secrets:
        SECRETS.add("a secret", secret)
    processors: list[Any] = [
        _add_context,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%Y-%m-%dT%H:%M:%S.%fZ", utc=True),
        structlog.processors.format_exc_info,
        _masked,
    ]
    if form == "json":
        processors += [structlog.processors.JSONRenderer(default=str), _json_masked]
    else:
        processors += [_shown, structlog.dev.ConsoleRenderer(colors=target.isatty())]
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


def guard() -> None:
    """Mask what other libraries log in this process, whatever handlers they have."""
    if logging.getLogRecordFactory() is not _masked_record:
        logging.setLogRecordFactory(_masked_record)


def _masked_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        record.msg, record.args = visible(redact(record.getMessage())), ()
    except (TypeError, ValueError, KeyError):  # the arguments do not fit: the handler says so
        return record
    if record.exc_info:
        # Formatters take this text where it is there already.
        record.exc_text = visible(redact(_TRACEBACK.formatException(record.exc_info)))
    return record


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


def _masked(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        # What is no JSON becomes text here, so that nothing gets past in the form that the renderer gives it.
        plain = value is None or isinstance(value, (bool, int, float, dict, list, tuple))
        event[name] = SECRETS.mask_value(value) if plain else redact(value if isinstance(value, str) else str(value))
    return event


def _json_masked(_logger: Any, _method: str, line: str) -> str:
    return json_safe(SECRETS.mask_json(line))


def _shown(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for name, value in event.items():
        if isinstance(value, (str, dict, list, tuple)):
            text = value if isinstance(value, str) else redact(str(value))
            event[name] = visible(text) if name in _TRACEBACKS else single_line(text)
    return event
