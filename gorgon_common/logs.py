"""Logs: structlog, for people or as JSON lines, always on stderr, with the run and step that they are about.

    log = get_logger(__name__)
    with context(run_id=run, step=step):
        log.info("claimed", attempt=2)

    telemetry.subscribe(logs.record)   # one line per event of each run, step and call

structlog is imported when the first line is logged.  Until `configure` is called, warnings and errors are shown.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TextIO

from gorgon_common import lazy, telemetry
from gorgon_common.masking import SECRETS, redact
from gorgon_common.printable import json_safe, single_line, visible

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_context: ContextVar[dict[str, Any]] = ContextVar("gorgon_log_context", default={})  # noqa: B039  never changed, only replaced
_TRACEBACKS = frozenset({"exception", "exc_info", "stack"})
"""Fields with several lines."""


_TRACEBACK = logging.Formatter()


_SPOKEN_FOR = ("celery.worker.strategy", "celery.app.trace")
"""Celery's log lines about messages are dropped.  They name no run and no step, and they say `succeeded` for a message
whose step has failed.  `record` logs what happens to steps.
"""


class _State:
    """The settings made by `configure`, for loggers created later."""

    threshold = _LEVELS["warning"]
    configured = False


class Logger:
    """Writes events with fields.  If its level is off, a call costs one comparison."""

    __slots__ = ("_name",)

    def __init__(self, name: str) -> None:
        self._name = name

    def debug(self, event: str, **fields: Any) -> None:
        """Log details that help to diagnose a fault."""
        self._write("debug", event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log normal operation."""
        self._write("info", event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log something that should be looked at eventually."""
        self._write("warning", event, fields)

    def error(self, event: str, **fields: Any) -> None:
        """Log something that has to be fixed."""
        self._write("error", event, fields)

    def exception(self, event: str, **fields: Any) -> None:
        """Log an error with the traceback of the current exception."""
        self._write("error", event, {**fields, "exc_info": True})

    def always(self, event: str, **fields: Any) -> None:
        """Log regardless of the level, for output that has a switch of its own."""
        self._write("info", event, fields, always=True)

    def _write(self, level: str, event: str, fields: dict[str, Any], *, always: bool = False) -> None:
        if always or _LEVELS[level] >= _State.threshold:
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
    """Set up logging for this process, including other libraries.

    `form` is `console` or `json`; `stream` defaults to stderr; `secrets` are values to mask in addition to
    `masking.SECRETS`.  Control characters are made visible, and a line feed in a field cannot start a new log line.
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
        wrapper_class=structlog.make_filtering_bound_logger(0),  # `Logger` and the root logger have already filtered
        logger_factory=structlog.PrintLoggerFactory(target),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Forward)]:
        root.removeHandler(handler)
    root.addHandler(_Forward())
    root.setLevel(_LEVELS[level])
    for name in _SPOKEN_FOR:
        logging.getLogger(name).setLevel(max(_LEVELS[level], logging.WARNING))
    logging.captureWarnings(form == "json")
    _State.threshold, _State.configured = _LEVELS[level], True


def guard() -> None:
    """Mask what other libraries log in this process, whatever handlers they have."""
    if logging.getLogRecordFactory() is not _masked_record:
        logging.setLogRecordFactory(_masked_record)


def _masked_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)
    try:
        record.msg, record.args = visible(redact(record.getMessage())), ()
    except (TypeError, ValueError, KeyError):  # the arguments do not fit; the handler reports it
        return record
    if record.exc_info:
        # If this text exists, formatters use it instead of formatting the exception themselves.
        record.exc_text = visible(redact(_TRACEBACK.formatException(record.exc_info)))
    return record


def record(event: telemetry.Event) -> None:
    """Log an event; for `telemetry.subscribe`.

    Events that need attention (a failed attempt or step, a refused result, an open breaker) are warnings, normal
    operation is at level info, and repeated events of each step are at level debug.
    """
    level, name, fields = _LINES[type(event)](event)
    if _LEVELS[level] >= _State.threshold:
        getattr(_TELEMETRY, level)(name, **{field: value for field, value in fields.items() if value not in (None, "")})


_TELEMETRY = Logger("gorgon")
_Line = tuple[str, str, dict[str, Any]]


def _run(run: telemetry.RunRef) -> dict[str, Any]:
    return {
        "run_id": run.run_id,
        "workflow": run.workflow,
        "team": run.team,
        "target": run.target,
        "trace_id": run.trace_id,
    }


def _step(step: telemetry.StepRef) -> dict[str, Any]:
    about = {"step": step.step, "kind": step.kind, "queue": step.queue, "role": step.role}
    return {**about, "attempt": step.attempt or None, **_run(step.run)}


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _run_created(event: telemetry.RunCreated) -> _Line:
    return "info", "run.resumed" if event.resumes else "run.created", _run(event.run)


def _run_ended(event: telemetry.RunEnded) -> _Line:
    more = {"seconds": _rounded(event.seconds), "error": event.error}
    return "warning" if event.status == "failed" else "info", f"run.{event.status}", {**_run(event.run), **more}


def _step_claimed(event: telemetry.StepClaimed) -> _Line:
    return "debug", "step.claimed", _step(event.step)


def _step_started(event: telemetry.StepStarted) -> _Line:
    return "info" if event.step.slow else "debug", "step.started", _step(event.step)


def _step_parked(event: telemetry.StepParked) -> _Line:
    fields = {**_step(event.step), "why": event.why, "wait_seconds": _rounded(event.wait)}
    if not event.attempt:
        return "info", "step.waiting", {**fields, "message": event.message}
    fields.update(error=event.message, error_kind=event.kind, seconds=_rounded(event.took))
    return "warning", "step.fallback" if event.why == "fallback" else "step.retry", fields


def _step_ended(event: telemetry.StepEnded) -> _Line:
    more = {
        "seconds": _rounded(event.seconds),
        "error": event.error,
        "error_kind": event.kind,
        "reason": event.reason,
    }
    level = "warning" if event.status == "failed" else "info"
    return level, f"step.{event.status}", {**_step(event.step), **more}


def _step_fenced(event: telemetry.StepFenced) -> _Line:
    reason = "another worker holds it, or it has ended: this result is not used"
    return "warning", "step.fenced", {**_step(event.step), "reason": reason}


def _step_recovered(event: telemetry.StepRecovered) -> _Line:
    fields = {**_step(event.step), "attempt": None, "why": event.why}
    return "warning", "step.recovered", fields


def _call(event: telemetry.CallSent | telemetry.CallRefused) -> dict[str, Any]:
    return {"provider": event.provider, "model": event.model, "target": event.target, "team": event.team}


def _call_sent(event: telemetry.CallSent) -> _Line:
    return "debug", "call.sent", _call(event)


def _call_refused(event: telemetry.CallRefused) -> _Line:
    return "debug", "call.held", {**_call(event), "why": event.why, "wait_seconds": _rounded(event.wait)}


def _call_settled(event: telemetry.CallSettled) -> _Line:
    more = {
        "provider": event.provider,
        "model": event.model,
        "outcome": event.outcome,
        "seconds": _rounded(event.seconds),
        "input_tokens": event.input_tokens,
        "output_tokens": event.output_tokens,
        "cost_usd": "unknown" if event.cost is None else event.cost / 1_000_000,
    }
    return "info", "call.settled", {**_step(event.step), **more}


def _breaker_changed(event: telemetry.BreakerChanged) -> _Line:
    about = {"provider": event.provider, "model": event.model, "target": event.target}
    if event.open:
        return "warning", "breaker.open", {**about, "seconds": _rounded(event.seconds)}
    return "warning", "breaker.closed", about


def _budget_refused(event: telemetry.BudgetRefused) -> _Line:
    name = "budget.waiting" if event.waits else "budget.refused"
    return "warning", name, {**_step(event.step), "message": event.message}


_LINES: dict[type, Callable[[Any], _Line]] = {
    telemetry.RunCreated: _run_created,
    telemetry.RunEnded: _run_ended,
    telemetry.StepClaimed: _step_claimed,
    telemetry.StepStarted: _step_started,
    telemetry.StepParked: _step_parked,
    telemetry.StepEnded: _step_ended,
    telemetry.StepFenced: _step_fenced,
    telemetry.StepRecovered: _step_recovered,
    telemetry.CallSent: _call_sent,
    telemetry.CallRefused: _call_refused,
    telemetry.CallSettled: _call_settled,
    telemetry.BreakerChanged: _breaker_changed,
    telemetry.BudgetRefused: _budget_refused,
}


class _Forward(logging.Handler):
    """Forwards records of other libraries to the same output."""

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
        # Values that are not JSON become masked text here, so that the renderer cannot put a secret into its own form
        # of them.
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
