"""Value types of a workflow file (durations, shares, names), each with its JSON Schema."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from gorgon_common import durations
from gorgon_common.workflow.schema_base import refuse

MAX_SECONDS = 10 * 365 * 86400.0


def duration(value: Any) -> float:
    """Return the seconds of `5m`, `24h`, `1h30m`, `500ms` or a number of seconds.

    Raises a validation error that names the accepted forms.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise refuse("a duration is expected here", durations.HINT)
    try:
        seconds = durations.parse(value) if isinstance(value, str) else float(value)
    except durations.NotADuration as error:
        raise refuse(str(error), error.hint) from None
    if not 0 <= seconds <= MAX_SECONDS:
        raise refuse(f"`{value}` is out of range", "A duration is between 0 and 10 years.")
    return round(seconds, 3)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _share(value: Any) -> Any:
    """Convert `90%` or 0.9 to 0.9."""
    hint = "Write a share such as 90% or 0.9."
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", value.strip())
        if match is None:
            raise refuse(f"`{value}` is not a share", hint)
        value = float(match[1]) / 100
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refuse("a share is expected here", hint)
    if not 0 <= value <= 1:
        raise refuse(f"`{value}` is not between 0 and 1 (0% and 100%)", hint)
    return float(value)


def _argument(value: Any) -> Any:
    """Allow unquoted whole numbers in an argv list; values with more than one spelling must be quoted."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value


def trust_reason(value: Any) -> Any:
    """Map `true` to the reason "true", and `false` to no reason."""
    if value is False:
        return None
    return "true" if value is True else value


def on_missing_word(value: Any) -> Any:
    """Accept `false` as the word or as the value."""
    return "false" if value is False else value


TEXT_OR_LIST: dict[str, Any] = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
DURATION_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": durations.PATTERN},
    ]
}

Duration = Annotated[float, BeforeValidator(duration), WithJsonSchema(DURATION_SCHEMA)]
Names = Annotated[list[str], BeforeValidator(_as_list), WithJsonSchema(TEXT_OR_LIST)]
Argument = Annotated[
    str, BeforeValidator(_argument), WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "integer"}]})
]
Share = Annotated[
    float,
    BeforeValidator(_share),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "minimum": 0, "maximum": 1},
                {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$"},
            ]
        }
    ),
]
Money = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Text = Annotated[str, Field(min_length=1)]
