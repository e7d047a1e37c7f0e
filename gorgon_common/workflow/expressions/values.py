"""The values of names during evaluation, and how values are rendered as text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from gorgon_common.errors import ExpressionError
from gorgon_common.workflow.expressions.errors import MissingValue
from gorgon_common.workflow.expressions.names import did_you_mean

MAX_TEXT = 1_000_000
"""Maximum number of characters in a rendered text, and in any text that an expression creates."""

STEP_FIELDS = ("output", "status", "error", "exit_code", "stdout", "stderr")
"""Fields of every step; an output field with one of these names is accessed as `step.output.name`."""


class _Missing:
    """The absence of a value, as opposed to null, which is a value."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "MISSING"

    def __bool__(self) -> bool:
        return False


MISSING: Final = _Missing()


@dataclass(frozen=True, slots=True)
class StepValue:
    """The value of a step's name.

    `output` is text or JSON data; `status` is one of the engine's words.  `exit_code`, `stdout` and `stderr` exist only
    for commands.  `published` contains the names that `outputs:` publishes in older files.  A step that was skipped or
    has not ended has no output, unless it is given one that is neither None nor MISSING (such as a default value).
    """

    output: Any = MISSING
    status: str = "succeeded"
    error: Any = None
    exit_code: int | None = None
    stdout: str | None = None
    stderr: str | None = None
    published: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""
    """The step's id, for messages."""
    reason: str = ""
    """Why the step was skipped, for messages."""

    def value(self) -> Any:
        """Return the output, or raise MissingValue."""
        if self.output is MISSING or (self.output is None and self.status != "succeeded"):
            step = f"step `{self.name}`" if self.name else "the step"
            why = f" ({self.reason})" if self.reason else ""
            raise MissingValue(f"{step} has no output: it is {self.status}{why}", hint=_DEFAULT_HINT)
        return self.output

    def get(self, name: str) -> Any:
        """Return the field `name`: one of STEP_FIELDS, of the output, or a published name.  Raises MissingValue."""
        if name == "output":
            return self.value()
        if name == "status":
            return self.status
        if name == "error":
            return self.error
        if name in ("exit_code", "stdout", "stderr"):
            own = getattr(self, name)
            if own is not None:
                return own
        if name in self.published:
            return self.published[name]
        output = self.value()
        if isinstance(output, Mapping):
            if name in output:
                return output[name]
            known: tuple[str, ...] = (*output, *STEP_FIELDS[:3])
        else:
            known = STEP_FIELDS[:3] if self.exit_code is None else STEP_FIELDS
        step = f"step `{self.name}`" if self.name else "the step"
        raise MissingValue(f"{step} has no field `{name}`", hint=did_you_mean(name, known))


_DEFAULT_HINT = "Write `default(x, y)` where it may be missing."


class Env(Mapping[str, Any]):
    """The names of an expression.  With `lenient` (older files), missing values render as nothing."""

    __slots__ = ("lenient", "names")

    def __init__(self, names: Mapping[str, Any], lenient: bool = False) -> None:
        self.names = names
        self.lenient = lenient

    def __getitem__(self, name: str) -> Any:
        return self.names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return a value as JSON text.  Raises ExpressionError if it is nested too deeply."""
    try:
        return json.dumps(value, ensure_ascii=False, indent=indent, default=_plain)
    except RecursionError:
        raise ExpressionError("the data is nested too deeply to be written as text") from None


def _plain(value: Any) -> Any:
    if isinstance(value, StepValue):
        return {"output": None if value.output is MISSING else value.output, "status": value.status}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (datetime, timedelta)):
        return to_text(value)
    if isinstance(value, (tuple, frozenset, set)):
        return list(value)
    raise ExpressionError(f"a value of type {type(value).__name__} cannot be written as text")


def to_text(value: Any) -> str:
    """Return a value as text: strings unchanged, scalars as JSON, everything else as indented JSON."""
    match value:
        case str():
            return value
        case bool() | None:
            return "null" if value is None else "true" if value else "false"
        case int():
            return str(value)
        case float():
            return number_text(value)
        case datetime():
            moment = value.astimezone(UTC).isoformat()
            return moment.replace("+00:00", "Z")
        case timedelta():
            return f"{number_text(value.total_seconds())}s"
        case StepValue():
            return to_text(value.value())
    text = to_json(value, indent=2)
    if len(text) > MAX_TEXT:
        raise too_long("the text", len(text))
    return text


def number_text(value: float) -> str:
    """Return a decimal in JSON and CEL notation: whole numbers without `.0`."""
    if value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return repr(value)


def too_long(what: str, length: int) -> ExpressionError:
    """Return the error for a text over the limit."""
    return ExpressionError(
        f"{what} is {length:,} characters long; the most is {MAX_TEXT:,}",
        hint="Shorten the parts with `truncate(x, n)`, or pass them to a step as a file.",
    )
