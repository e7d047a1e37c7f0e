"""What a provider limits, as data: the limiter knows no dimension by name.

A *dimension* is one thing that a provider counts in a period: requests per minute, input tokens per minute, points per
hour.  A provider's descriptor declares its dimensions; a tier or an operator gives the amounts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

MINUTE, HOUR, DAY = 60.0, 3600.0, 86_400.0


class Counts(StrEnum):
    """What a call costs in a dimension: what is reserved before it, and what is charged after it."""

    CALLS = "calls"  # one; nothing changes afterwards
    TOKENS = "tokens"  # the larger of the input and the maximum reply, as OpenAI admits calls; then input plus output
    INPUT = "input"  # the input tokens
    UNCACHED_INPUT = "uncached_input"  # the input tokens; then without those that were read from the prompt cache
    OUTPUT = "output"  # the maximum reply; then the output tokens
    OPERATION = "operation"  # what `costs` says of the operation; nothing changes afterwards


@dataclass(frozen=True, slots=True)
class Header:
    """The headers that report a dimension.  Each is a name in lower case, empty if the provider has none.

    `moment`: `reset` holds a time (RFC 3339, or seconds since 1970), not a duration.  `resource`: (header, value)
    that the reply has to have, for a provider that reports several limits under the same names.
    """

    limit: str = ""
    remaining: str = ""
    reset: str = ""
    moment: bool = False
    resource: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Dimension:
    """One thing that a provider counts.

    `period` is in seconds.  `whole`: the largest cost that has to be available in full before a call starts, such as 1
    request; 0 if a call may start with a part and leave a debt, as a call of many tokens does.  `costs`: the cost by
    operation or effect, "*" for any other (for Counts.OPERATION).  `per`: the label of a call, such as `channel`, each
    value of which has the amount for itself.
    """

    name: str
    period: float = MINUTE
    whole: float = 0.0
    counts: Counts = Counts.CALLS
    costs: Mapping[str, float] = field(default_factory=dict)
    header: Header | None = None
    per: str = ""

    def cost_of(self, operation: str, effect: str) -> float:
        """Return what an operation costs; the cost of its effect if it is not named itself, else that of "*"."""
        for name in (operation, effect, "*"):
            if name in self.costs:
                return self.costs[name]
        return 1.0
