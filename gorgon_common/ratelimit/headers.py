"""Rate-limit headers of the providers → `Signal`s."""

from __future__ import annotations

from collections.abc import Mapping

from gorgon_common import durations
from gorgon_common.clock import SYSTEM_CLOCK, Clock, parse_time
from gorgon_common.engine.limits import Signal
from gorgon_common.operations.dimensions import Header
from gorgon_common.operations.providers import dimensions_of


def signals(provider: str, headers: Mapping[str, str], *, clock: Clock = SYSTEM_CLOCK) -> dict[str, Signal]:
    """Return what the headers of a reply (in lower case) report, by dimension.  Unreadable headers are ignored."""
    found: dict[str, Signal] = {}
    for dimension in dimensions_of(provider):
        if dimension.header is not None:
            signal = _signal(dimension.header, headers, clock)
            if signal is not None:
                found[dimension.name] = signal
    return found


def _signal(header: Header, headers: Mapping[str, str], clock: Clock) -> Signal | None:
    if header.resource is not None and headers.get(header.resource[0]) != header.resource[1]:
        return None
    limit, remaining = _number(headers.get(header.limit)), _number(headers.get(header.remaining))
    if limit == 0:
        limit = None  # a limit of 0 would admit nothing: the server does not know its limit
    if limit is None and remaining is None:
        return None
    text = headers.get(header.reset, "")
    return Signal(limit, remaining, _left(text, clock) if header.moment else seconds(text), header.moment)


def seconds(text: str) -> float | None:
    """Return the seconds of a duration such as `6m0s`, `120ms` or a bare number; None for anything else."""
    number = _number(text)
    if number is not None:
        return number
    try:
        return durations.parse(text)
    except durations.NotADuration:
        return None


def _left(text: str, clock: Clock) -> float | None:
    """Return the seconds until a time: RFC 3339, or seconds since 1970."""
    moment = _number(text)
    if moment is None:
        try:
            moment = parse_time(text).timestamp()
        except ValueError:
            return None
    return max(0.0, moment - clock.now().timestamp())


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if 0 <= value < 1e15 else None
