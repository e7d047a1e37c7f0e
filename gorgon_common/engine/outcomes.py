"""What may become of a step that a worker holds: values, folded into the store by `machine`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine import limits
from gorgon_common.engine.records import Result, Room, Row
from gorgon_common.engine.states import RunStatus

RETRY, BUDGET, TIME, EVENT = "retry", "budget", "time", "event"
REASONS = frozenset(
    {
        RETRY,
        BUDGET,
        TIME,
        EVENT,
        *limits.DIMENSIONS,
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
    """The step has ended.  `skipped`: rows that can no longer run because of it → why."""

    result: Result
    skipped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Passed:
    """The step's conditions hold; it is now for a worker of its queue."""


@dataclass(frozen=True, slots=True)
class Parked:
    """The step waits `seconds`, for one of REASONS.  `attempt`: what came before was an attempt.

    `message` says it to people.  `room`: what it waits for on a budget; it is woken when there is so much.  `event`:
    what it waits for to be sent to the run.
    `kind`: what went wrong with an attempt, in a word; `took`: how many seconds it was.
    """

    seconds: float
    reason: str
    message: str
    calls: Sequence[CallRecord] = ()
    attempt: bool = True
    room: Room | None = None
    event: str | None = None
    kind: str = ""
    took: float | None = None


@dataclass(frozen=True, slots=True)
class Expanded:
    """The composite becomes these children, and goes on when they have ended.  See `Store.expand`."""

    rows: Sequence[Row]
    phase: str
    round: int = 0
    items: Sequence[Any] | None = None
    window: int | None = None
    reduce: int | None = None
    result: Result | None = None
    """A failed step with a fallback: how it failed, for the ledger."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The step has failed and takes what is around it with it: `container` is the row that goes on afterwards."""

    result: Result
    container: int
    run_fails: bool


@dataclass(frozen=True, slots=True)
class Ended:
    """The last step of the run: the run ends with it."""

    result: Result
    status: RunStatus
    outputs: Any
    error: Mapping[str, Any] | None


Outcome = Done | Passed | Parked | Expanded | Failed | Ended
