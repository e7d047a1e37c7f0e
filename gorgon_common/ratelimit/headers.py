"""Rate-limit headers of the providers → `Signal`s."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from gorgon_common import durations
from gorgon_common.clock import SYSTEM_CLOCK, Clock, parse_time
from gorgon_common.engine.limits import Signal

_OPENAI = {"requests": "requests", "tokens": "tokens"}
_ANTHROPIC = {"requests": "requests", "input-tokens": "input_tokens", "output-tokens": "output_tokens"}


def signals(headers: Mapping[str, str], *, clock: Clock = SYSTEM_CLOCK) -> dict[str, Signal]:
    """Return the signals of headers (lower-case) by dimension.  Unreadable headers are ignored."""
    found: dict[str, Signal] = {}
    for word, name in _OPENAI.items():
        stem = "x-ratelimit-{}-" + word
        _add(found, name, headers, stem, seconds(headers.get(stem.format("reset"), "")), absolute=False)
    for word, name in _ANTHROPIC.items():
        stem = f"anthropic-ratelimit-{word}-{{}}"
        moment = _moment(headers.get(stem.format("reset"), ""))
        left = None if moment is None else max(0.0, (moment - clock.now()).total_seconds())
        _add(found, name, headers, stem, left, absolute=True)
    return found


def _add(
    found: dict[str, Signal], name: str, headers: Mapping[str, str], stem: str, resets: float | None, *, absolute: bool
) -> None:
    limit, remaining = _number(headers.get(stem.format("limit"))), _number(headers.get(stem.format("remaining")))
    if limit == 0:
        limit = None  # a limit of 0 would admit nothing: the server does not know its limit
    if limit is not None or remaining is not None:
        found[name] = Signal(limit, remaining, resets, absolute)


def seconds(text: str) -> float | None:
    """Return the seconds of a duration such as `6m0s`, `120ms` or a bare number; None for anything else."""
    number = _number(text)
    if number is not None:
        return number
    try:
        return durations.parse(text)
    except durations.NotADuration:
        return None


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < 1e15 else None


def _moment(text: str) -> datetime | None:
    try:
        return parse_time(text)
    except ValueError:
        return None
