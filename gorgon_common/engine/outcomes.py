"""The possible outcomes of a step that a worker holds: values that `machine` commits to the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine import limits
from gorgon_common.engine.records import BudgetRequest, Result, Row
from gorgon_common.engine.states import RunStatus
from gorgon_common.operations.providers import DIMENSIONS

RETRY, BUDGET, TIME, EVENT = "retry", "budget", "time", "event"
REASONS = frozenset(
    {
        RETRY,
        BUDGET,
        TIME,
        EVENT,
        *DIMENSIONS,
        limits.RETRY_AFTER,
        limits.BREAKER,
        limits.CONCURRENCY,
        limits.TURN,
        limits.UNREACHABLE,
    }
)
"""What a parked step may wait for: its next attempt, room on a budget, a time, an event, or what the limiter says
(`limits.Wait`)."""


@dataclass(frozen=True, slots=True)
class Done:
    """The step has ended.  `skipped`: rows that can no longer run because of it → reason."""

    result: Result
    skipped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ConditionMet:
    """The step's conditions hold; a worker of its queue may now run it."""


@dataclass(frozen=True, slots=True)
class Snoozed:
    """The step waits `seconds`, for one of REASONS.  `attempt`: the preceding work counts as an attempt.

    `message` explains the wait to the user.  `room`: the room on a budget that it waits for; it is woken when that much
    is available.  `event`: the event of the run that it waits for.  `kind`: the kind of error that ended the attempt;
    `took`: the attempt's duration in seconds.
    """

    seconds: float
    reason: str
    message: str
    calls: Sequence[CallRecord] = ()
    attempt: bool = True
    room: BudgetRequest | None = None
    event: str | None = None
    kind: str = ""
    took: float | None = None


@dataclass(frozen=True, slots=True)
class Expanded:
    """The composite becomes these children, and continues when they have ended.  See `Store.expand`."""

    rows: Sequence[Row]
    phase: str
    round: int = 0
    items: Sequence[Any] | None = None
    window: int | None = None
    reduce: int | None = None
    result: Result | None = None
    """How a failed step with a fallback failed, for the ledger."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The step has failed and stops what is around it; `container` is the row that continues afterwards."""

    result: Result
    container: int
    run_fails: bool


@dataclass(frozen=True, slots=True)
class RunFinished:
    """The run's last step has ended, and the run with it."""

    result: Result
    status: RunStatus
    outputs: Any
    error: Mapping[str, Any] | None


Outcome = Done | ConditionMet | Snoozed | Expanded | Failed | RunFinished
