"""Sums over the ledger, and their form in documents."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Row, func

from gorgon_common.clock import format_time
from gorgon_common.persistence.tables import ledger

MICRO = 1_000_000

SUMS = (
    func.sum(ledger.c.input_tokens).label("used_in"),
    func.sum(ledger.c.output_tokens).label("used_out"),
    func.sum(ledger.c.cost_micro).label("cost"),
    (func.count() - func.count(ledger.c.cost_micro)).label("unpriced"),
    func.min(ledger.c.at).label("first"),
)


def time_text(moment: datetime | None) -> str | None:
    """Return a time as RFC 3339, and None for None."""
    return None if moment is None else format_time(moment)


def costs(spent: Row[Any] | None) -> dict[str, Any]:
    """Return the costs in US dollars.

    The sum is None, never 0, if the cost of any call is unknown.  The known part and the number of such calls are
    beside it.
    """
    known = 0.0 if spent is None else int(spent.cost or 0) / MICRO
    unpriced = 0 if spent is None else int(spent.unpriced)
    return {"cost_usd": None if unpriced else known, "known_cost_usd": known, "unpriced_calls": unpriced}
