"""The ledger of budgets: every change of an account is a posting, and the postings are the balances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from gorgon_common.costs.budgets import Balance


class Kind(IntEnum):
    """Why a posting was made."""

    RESERVE = 0  # before a call
    SETTLE = 1  # the actual cost
    RELEASE = 2  # the call was not made
    UNKNOWN = 3  # the actual cost is unknown: posted in full
    ADJUST = 4  # an unknown cost became known
    OPENING = 5  # spent before the budget was set


@dataclass(frozen=True, slots=True)
class Posting:
    """One change of an account, in micro-dollars and tokens."""

    period: int
    kind: Kind
    usd_reserved: int = 0
    usd_spent: int = 0
    usd_overrun: int = 0
    token_reserved: int = 0
    token_spent: int = 0
    token_overrun: int = 0


def replay(postings: Iterable[Posting]) -> dict[int, Balance]:
    """Return the balances after these postings, by account number, without limits.

    As in `Balance`, `spent` includes the overrun.
    """
    sums: dict[int, list[int]] = {}
    for posting in postings:
        total = sums.setdefault(posting.period, [0] * 6)
        for place, change in enumerate(
            (
                posting.usd_spent + posting.usd_overrun,
                posting.usd_reserved,
                posting.usd_overrun,
                posting.token_spent + posting.token_overrun,
                posting.token_reserved,
                posting.token_overrun,
            )
        ):
            total[place] += change
    return {
        period: Balance(
            usd_spent=usd_spent,
            usd_reserved=usd_reserved,
            usd_overrun=usd_overrun,
            token_spent=token_spent,
            token_reserved=token_reserved,
            token_overrun=token_overrun,
        )
        for period, (usd_spent, usd_reserved, usd_overrun, token_spent, token_reserved, token_overrun) in sums.items()
    }
