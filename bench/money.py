"""Audits the books: nothing over, ledger and balances agree, and the sandbox's own bill is the same."""

from __future__ import annotations

from dataclasses import replace

from sqlalchemy import func, select

from gorgon_common.costs.ledger import replay
from gorgon_common.costs.prices import GenaiPricer
from gorgon_common.costs.usage import Usage
from gorgon_common.persistence.budgets import Budgets
from gorgon_common.persistence.tables import ledger
from tests.support.sandbox import Sandbox
from tests.support.services import Services


def over(mine: Budgets) -> int:
    """Return the micro-dollars above the limits, summed over all accounts."""
    return sum(
        max(0, balance.usd_spent + balance.usd_reserved - balance.usd_limit) + balance.usd_overrun
        for balance in mine.balances().values()
        if balance.usd_limit is not None
    )


def replayed(mine: Budgets) -> bool:
    """Return whether the balance of every account equals the sum of its postings."""
    told = replay(mine.postings())
    return all(
        replace(balance, usd_limit=None, token_limit=None) == told.get(number)
        for number, balance in mine.balances().items()
        if number in told or balance.usd_spent or balance.usd_reserved
    )


def paid(services: Services) -> int:
    """Return the sum of the ledger, in micro-dollars."""
    with services.database.read() as connection:
        return int(connection.scalar(select(func.coalesce(func.sum(ledger.c.cost_micro), 0))) or 0)


def bill(sandbox: Sandbox) -> int:
    """Return the cost of the tokens counted by the sandbox at today's prices, in micro-dollars."""
    pricer = GenaiPricer()
    total = 0
    for providers in sandbox.bill().values():
        for provider, models in providers.items():
            for model, kinds in models.items():
                usage = Usage(
                    input_tokens=kinds.get("input", 0),
                    cache_read_tokens=kinds.get("cached", 0),
                    output_tokens=kinds.get("output", 0),
                )
                total += pricer.price(provider, model, usage) or 0
    return total
