"""The reserve link: budgets set the most that a call can cost aside before it is made."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from gorgon_common.engine.calls.outside import OutsideCall
from gorgon_common.engine.ports import AgentCall


class Money(Protocol):
    """The budgets of a step: `budget.StepBudget`."""

    def reserve(self, provider: str, call: AgentCall, ordinal: int) -> tuple[AgentCall, bool]:
        """Return the call as the budgets allow it, and whether they hold a reservation for it."""
        ...

    def over(self, ordinal: int) -> bool:
        """End a call; return whether a budget that was set in the meantime holds a reservation for it."""
        ...


class NoMoney:
    """For calls that no budget counts."""

    def reserve(self, provider: str, call: AgentCall, ordinal: int) -> tuple[AgentCall, bool]:
        """Reserve nothing."""
        return call, False

    def over(self, ordinal: int) -> bool:
        """Return False."""
        return False


class InFlight:
    """A context in which a call is in flight for the budgets; one that is set meanwhile counts the call, too."""

    __slots__ = ("_call", "_money")

    def __init__(self, money: Money, call: OutsideCall) -> None:
        self._money = money
        self._call = call

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._call.held = self._money.over(self._call.ordinal) or self._call.held


def reserve(money: Money, call: OutsideCall) -> InFlight:
    """Reserve for a call, which may get a lower `max_tokens`; return the context to make it in.

    Raises BudgetExceeded, BudgetWait, Unpriced, Unavailable.
    """
    call.request, call.held = money.reserve(call.provider, call.request, call.ordinal)
    return InFlight(money, call)
