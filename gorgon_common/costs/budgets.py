"""Budgets as values: spending limits by scope and period, and what is left of them.

The hierarchy is org → team → workflow → run → step.  A *budget* is set by an operator for an org, a team or a workflow,
for each run, day or month; files limit their runs and steps.  An *account* is a budget in one period, or a limit of a
file; it counts what is spent and reserved.  Amounts are integer micro-dollars.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any
from zoneinfo import ZoneInfo

from gorgon_common.errors import InputInvalid
from gorgon_common.scope import FIRST_ORG

MICRO = 1_000_000
PERIODS = ("run", "day", "month")
LEVELS = {"org": 10, "team": 20, "workflow": 30, "run": 40, "step": 50}
"""Locks are taken from the highest level to the lowest.  A step inside a composite is one level above it."""
SCOPES = ("org", "team", "workflow")
"""The scopes for which an operator sets budgets."""
_WORDS = {"run": "per run", "day": "per day", "month": "per month"}
MOST = 10**15
"""The highest limit or amount (a billion dollars in micro-dollars), so that sums fit 64 bits."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget that an operator has set.  `usd` in micro-dollars; None: no such limit.  `name` is empty for the org."""

    id: int
    scope: str
    name: str
    period: str
    timezone: str
    usd: int | None
    tokens: int | None
    org: int = FIRST_ORG

    @property
    def label(self) -> str:
        """The name that people use."""
        return f"the budget of {f'{self.scope} {self.name}'.strip()} {_WORDS[self.period]}"

    def applies(self, *, org: int = FIRST_ORG, team: str, workflow: str) -> bool:
        """Return whether it applies to the calls of such a run."""
        if self.org != org:
            return False
        return self.scope == "org" or self.name == (team if self.scope == "team" else workflow)

    def account(self, *, target: str, root: int, now: datetime) -> Account:
        """Return its account for a run now.  Sandbox runs spend play money, so they have separate accounts."""
        name, starts, ends = window(self.period, self.timezone, now)
        return Account(
            key=f"budget:{self.id}:{target}:{name or f'run {root}'}",
            level=LEVELS[self.scope],
            label=f"{self.label}{f' ({name})' if name else ''}{' on the sandbox' if target == 'sandbox' else ''}",
            usd=self.usd,
            tokens=self.tokens,
            starts=starts,
            ends=ends,
            budget=self.id,
        )


@dataclass(frozen=True, slots=True)
class Account:
    """An account that counts spending.  The key is unique; the level determines the lock order."""

    key: str
    level: int
    label: str
    usd: int | None
    tokens: int | None
    starts: datetime | None = None
    ends: datetime | None = None
    budget: int | None = None


@dataclass(frozen=True, slots=True)
class Balance:
    """The balance of an account.  `spent` includes amounts beyond a reservation (`overrun`)."""

    usd_limit: int | None = None
    usd_spent: int = 0
    usd_reserved: int = 0
    usd_overrun: int = 0
    token_limit: int | None = None
    token_spent: int = 0
    token_reserved: int = 0
    token_overrun: int = 0
    usd_claimed: int = 0
    token_claimed: int = 0
    """The amounts kept free for steps that have waited longer."""

    def room(self, *, released: bool = False) -> tuple[int | None, int | None]:
        """Return (micro-dollars, tokens) that are left for this call, None without a limit.

        `released`: as if nothing were reserved and no step waiting.
        """
        usd = None if self.usd_limit is None else self.usd_limit - self.usd_spent
        tokens = None if self.token_limit is None else self.token_limit - self.token_spent
        if released:
            return usd, tokens
        return (
            None if usd is None else usd - self.usd_reserved - self.usd_claimed,
            None if tokens is None else tokens - self.token_reserved - self.token_claimed,
        )

    def fits(self, usd: int, tokens: int, *, released: bool = False) -> bool:
        """Return whether this amount is left."""
        usd_room, token_room = self.room(released=released)
        return (usd_room is None or usd <= usd_room) and (token_room is None or tokens <= token_room)


@dataclass(frozen=True, slots=True)
class Shortage:
    """An account that has too little left for a request.  `period` is the account's number in the store."""

    account: Account
    balance: Balance
    period: int

    def explain(self, usd: int, tokens: int, what: str = "The next call") -> str:
        """Return a message that names the budget, what is left of it, and what `what` may need."""
        usd_room, token_room = self.balance.room()
        if usd_room is not None and usd > usd_room:
            shown = (
                self.balance.usd_limit or 0,
                self.balance.usd_spent,
                self.balance.usd_reserved,
                usd,
                max(0, usd_room),
                self.balance.usd_claimed,
            )
            limit, spent, reserved, needed, left, claimed = (dollars(amount) for amount in shown)
        else:
            shown = (
                self.balance.token_limit or 0,
                self.balance.token_spent,
                self.balance.token_reserved,
                tokens,
                max(0, token_room or 0),
                self.balance.token_claimed,
            )
            limit, spent, reserved, needed, left, claimed = (f"{amount:,} tokens" for amount in shown)
        verb = "cost" if usd_room is not None and usd > usd_room else "use"
        others = f", {claimed} for steps that have waited longer" if shown[-1] else ""
        return (
            f"{self.account.label[0].upper()}{self.account.label[1:]} is {limit}: {spent} spent, {reserved} reserved"
            f"{others}."
            f" {what} may {verb} {needed}; {left} is left."
        )


def window(period: str, timezone: str, now: datetime) -> tuple[str, datetime | None, datetime | None]:
    """Return (name, start, end) of the period that `now` is in; ("", None, None) for `run`.

    A day begins at midnight of its timezone, or at the first moment after it where midnight does not exist.
    """
    if period == "run":
        return "", None, None
    zone = ZoneInfo(timezone)
    today = now.astimezone(zone).date()
    if period == "day":
        first, after = today, today + timedelta(days=1)
        name = today.isoformat()
    else:
        first = today.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
        name = f"{first:%Y-%m}"
    starts, ends = (datetime(day.year, day.month, day.day, tzinfo=zone).astimezone(UTC) for day in (first, after))
    return name, starts, ends


def parse_scope(text: str) -> tuple[str, str]:
    """Return (scope, name) from `org`, `team:NAME` or `workflow:NAME`.  Raises InputInvalid."""
    scope, _, name = text.partition(":")
    if scope not in SCOPES or bool(name) == (scope == "org") or len(name) > 200:
        raise InputInvalid(
            f"`{text}` is not a budget scope.",
            hint="Write org, team:NAME or workflow:NAME; runs and steps are limited in their file (`limits:`).",
        )
    return scope, name


def parse_period(period: str, timezone: str) -> None:
    """Check a period and its timezone.  Raises InputInvalid."""
    if period not in PERIODS:
        raise InputInvalid(f"There is no period `{period}`.", hint="Write run, day or month.")
    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):
        raise InputInvalid(
            f"There is no time zone `{timezone}`.", hint="Write a name like Europe/Berlin or UTC."
        ) from None


def micro_dollars(value: Any, what: str = "A budget") -> int:
    """Return an amount in dollars as whole micro-dollars, rounded down.  Raises InputInvalid if it is not an amount."""
    try:
        amount = Decimal(str(value))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite():
        raise InputInvalid(f"`{value}` is not an amount in dollars.", hint="Write it like 12.50.")
    if amount < 0:
        raise InputInvalid(f"{what} cannot be negative: {value}.", hint="0 blocks every call that costs money.")
    micro = math.floor(amount * MICRO)
    if micro > MOST:
        raise InputInvalid(f"{what} of {value} dollars is too high.", hint="The maximum is one billion.")
    return micro


def token_count(value: Any, what: str = "A budget") -> int:
    """Return a number of tokens.  Raises InputInvalid."""
    try:
        count = int(str(value).replace(",", "").replace("_", ""))
    except ValueError:
        raise InputInvalid(f"`{value}` is not a number of tokens.", hint="Write it like 150000.") from None
    if count < 0:
        raise InputInvalid(f"{what} cannot be negative: {value}.", hint="0 blocks every call.")
    if count > MOST:
        raise InputInvalid(f"{what} of {value} tokens is too high.")
    return count


def dollars(micro: int) -> str:
    """Return an amount for people, with at least two decimals and no trailing zeros beyond them."""
    sign = "-" if micro < 0 else ""
    whole, part = divmod(abs(micro), MICRO)
    digits = f"{part:06d}".rstrip("0").ljust(2, "0")
    return f"{sign}${whole:,}.{digits}"
