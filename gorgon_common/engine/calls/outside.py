"""What one call carries through the chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gorgon_common.engine.ports import AgentCall


@dataclass(slots=True)
class OutsideCall:
    """One call on its way through the chain.

    `ordinal` counts the calls of a claim from 1.  `began` is on the monotonic clock.  `held`: budgets hold a
    reservation for it.  `request` may ask for a shorter reply than at first, if that makes it fit a budget.
    """

    provider: str
    ordinal: int
    request: AgentCall
    began: float
    cancelled: Callable[[], bool]
    held: bool = False
