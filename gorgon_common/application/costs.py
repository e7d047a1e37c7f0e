"""What calls have cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gorgon_common.bootstrap import Services
from gorgon_common.costs.tracker import RecordedCall
from gorgon_common.persistence.reports import Filters
from gorgon_common.scope import Scope


def report(
    services: Services,
    scope: Scope,
    by: Sequence[str],
    *,
    since: str | None = None,
    until: str | None = None,
    only: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Return the costs of calls, with a row for each combination of `by`; see `Reports.report`.

    `since`, `until`: days in UTC (the last one included) or RFC 3339 times.  `only`: dimension → value; its target may
    be `all`.  Without a target, only calls that cost real money are included; see `Filters.read`.  Raises InputInvalid.
    """
    return services.reports.report(by, Filters.read(since, until, only, by), limit=limit)


def calls(
    services: Services,
    scope: Scope,
    *,
    since: str | None = None,
    until: str | None = None,
    only: Mapping[str, str] | None = None,
    limit: int = 1000,
    cursor: str | None = None,
) -> dict[str, Any]:
    """Return `{items, next}`: a row for each call; see `Reports.calls`.  Raises InputInvalid."""
    return services.reports.calls(Filters.read(since, until, only), limit=limit, cursor=cursor)


def record(services: Services, scope: Scope, calls: Sequence[RecordedCall]) -> None:
    """Store calls that were made outside of runs, for reports; see `costs.tracker`."""
    services.reports.record(calls)
