"""What an organisation, its teams and their workflows may spend."""

from __future__ import annotations

from typing import Any

from gorgon_common.bootstrap import Services
from gorgon_common.costs import budgets as amounts
from gorgon_common.persistence.budgets import UNCHANGED
from gorgon_common.scope import Scope

__all__ = ["UNCHANGED", "change", "dollars", "listing", "parse_subject"]

dollars = amounts.dollars
"""Return micro-dollars for people: `$1.50`."""
parse_subject = amounts.parse_scope
"""Return (org | team | workflow, name) of a text such as `team:web`.  Raises InputInvalid."""


def change(
    services: Services,
    scope: Scope,
    subject: str,
    *,
    period: str = "month",
    timezone: str | None = None,
    usd: Any = UNCHANGED,
    tokens: Any = UNCHANGED,
) -> dict[str, Any]:
    """Set what an org, a team or a workflow may spend per run, day or month; returns the budget.

    `subject`: org, team:NAME or workflow:NAME.  `usd`: dollars, exact as text; None removes the limit.  `timezone`: the
    time zone in which days begin, UTC for a new budget.  Raises InputInvalid.
    """
    return services.budgets.change(subject, period=period, timezone=timezone, usd=usd, tokens=tokens, caller=scope)


def listing(services: Services, scope: Scope) -> list[dict[str, Any]]:
    """Return every budget with its accounts of the current period, one for each target that has spent.

    `{scope, name, period, timezone, usd_limit, token_limit, accounts: [{label, target, starts_at, ends_at, usd_spent,
    usd_reserved, usd_overrun, token_spent, token_reserved, token_overrun}]}`, in micro-dollars.
    """
    return services.budgets.listing(scope)
