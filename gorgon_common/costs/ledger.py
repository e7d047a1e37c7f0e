"""The ledger of budgets: every change of an account is a posting, and the postings are the balances."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

from gorgon_common.costs.budgets import Balance


class Kind(IntEnum):
    """Why a posting was made."""

    RESERVE = 0  # before a call
    SETTLE = 1  # what it came to
    RELEASE = 2  # it was not made
    UNKNOWN = 3  # nobody knows what it came to: posted in full
    ADJUST = 4  # somebody found out
    OPENING = 5  # spent before the budget was set


@dataclass(frozen=True, slots=True)
class Posting:
    """One change of an account, by so much.  Micro-dollars and tokens."""

    period: int
    kind: Kind
    usd_reserved: int = 0
    usd_spent: int = 0
    usd_overrun: int = 0
    token_reserved: int = 0
    token_spent: int = 0
    token_overrun: int = 0


def replay(postings: Iterable[Posting]) -> dict[int, Balance]:
    """Return what the accounts must hold after these postings, by account number, without their limits.

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
