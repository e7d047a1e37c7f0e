"""What the engine needs from the store of budget accounts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from gorgon_common.costs.budgets import Account, Budget, Shortage
from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.records import Claimed, RunInfo


@dataclass(frozen=True, slots=True)
class Held:
    """A reservation: at most `usd` micro-dollars and `tokens`, for a reply of at most `max_tokens`.

    `is_open` is False if it has already been settled; another claim then needs a new reservation.
    """

    key: tuple[int, int, int]
    max_tokens: int
    usd: int
    tokens: int
    is_open: bool = True


class BudgetStore(Protocol):
    """The store of budget accounts: `persistence.budgets.Budgets`.  All methods raise Unavailable."""

    def applying(self, info: RunInfo) -> Sequence[Budget]:
        """Return the budgets that apply to a run's calls, in addition to the limits in its file."""
        ...

    def reserve(
        self,
        key: tuple[int, int, int],
        info: RunInfo,
        own: Sequence[Account],
        *,
        usd: int,
        tokens: int,
        max_tokens: int,
    ) -> Held | Shortage:
        """Reserve an amount on every account, or on none."""
        ...

    def look(self, info: RunInfo, own: Sequence[Account]) -> Sequence[Shortage]:
        """Return every account with its balance."""
        ...

    def now(self) -> datetime:
        """Return the current time, which determines when periods begin and end."""
        ...

    def note(self, key: tuple[int, int, int], info: RunInfo, bound: Callable[[], tuple[int, int, int]]) -> None:
        """Record the start of a call that no budget applies to.  If a budget is set before the call ends, `bound()` is
        reserved on it: (micro-dollars, tokens, longest reply).
        """
        ...

    def over(self, key: tuple[int, int, int]) -> bool:
        """Record the end of a call.  Returns whether a reservation was made for it in the meantime."""
        ...

    def unknown(self, key: tuple[int, int, int], bound: tuple[int, int, int]) -> None:
        """Record the bound of a finished, unbudgeted call of unknown cost, so that later budgets count it."""
        ...

    def keep(self, step: Claimed, calls: Sequence[CallRecord], body: str) -> None:
        """Post the cost of a claim's calls so far, and store the state of their conversation."""
        ...

    def record(self, step: Claimed, calls: Sequence[CallRecord]) -> None:
        """Post and store the cost of a claim's calls so far."""
        ...

    def kept(self, step: Claimed) -> str | None:
        """Return the stored state of a step's conversation."""
        ...
