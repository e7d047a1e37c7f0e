"""Which calls a report covers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from gorgon_common.clock import parse_time
from gorgon_common.errors import InputInvalid
from gorgon_common.scope import SYSTEM, Scope

DIMENSIONS = ("provider", "model", "role", "team", "workflow", "run", "step", "day", "target", "outcome")
"""The dimensions by which a report can be grouped."""

LIBRARY = "library"
"""The target of calls that were made outside of runs and recorded with `costs.tracker`."""
REAL = ("live", LIBRARY)
"""Targets whose calls cost real money.  Costs in the sandbox are simulated, and are only included on request."""
TARGETS = (*REAL, "sandbox")


@dataclass(frozen=True, slots=True)
class Filters:
    """The calls that a report covers: `since` ≤ time < `until`, and exact values of dimensions."""

    since: datetime | None = None
    until: datetime | None = None
    only: Mapping[str, str] = field(default_factory=dict)
    """Dimension → value; `run` is a run's public id."""
    targets: tuple[str, ...] = TARGETS
    scope: Scope = SYSTEM
    """Whose calls: those of its organisation."""

    @classmethod
    def read(
        cls,
        since: str | None,
        until: str | None,
        only: Mapping[str, str] | None,
        by: Sequence[str] = (),
        *,
        scope: Scope = SYSTEM,
    ) -> Filters:
        """Parse filters from text: a day in UTC (the last one is included) or an RFC 3339 time.

        The target is live, sandbox, library or all.  Without a target, the filters select calls that cost real money,
        unless they name one run or the rows are grouped by target.  Raises InputInvalid.
        """
        rest = dict(only or {})
        target = rest.pop("target", None)
        targets: tuple[str, ...]
        if target is None:
            targets = TARGETS if "run" in rest or "target" in by else REAL
        elif target == "all":
            targets = TARGETS
        elif target in TARGETS:
            targets = (target,)
        else:
            raise InputInvalid(f"There is no target {target!r}.", hint=f"Targets: {', '.join(TARGETS)}, or all.")
        return cls(
            None if since is None else _moment(since, end=False),
            None if until is None else _moment(until, end=True),
            rest,
            targets,
            scope,
        )


def _moment(text: str, *, end: bool) -> datetime:
    try:
        if len(text) == len("2026-11-22"):
            day = datetime.fromisoformat(text).replace(tzinfo=UTC)
            return day + timedelta(days=1) if end else day
        return parse_time(text)
    except (ValueError, OverflowError):
        raise InputInvalid(
            f"{text[:60]!r} is not a valid date or time.", hint="Write 2026-11-22, or 2026-11-22T09:30:00Z."
        ) from None
