"""Plain, immutable records exchanged between the engine, the store and the workers.

A step's id is `run << 20 | row`: a run has at most 1,048,576 rows, and the run of a row needs no lookup.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, IntEnum
from typing import Any

from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.states import StepStatus

ROW_BITS = 20
ROW_MASK = (1 << ROW_BITS) - 1
MAX_ROWS = 1 << ROW_BITS


def step_id(run: int, row: int) -> int:
    """Return the step id of a run's row."""
    return run << ROW_BITS | row


class Weight(IntEnum):
    """What a step costs a worker."""

    INLINE = 0  # needs no provider: runs in the process that makes it ready
    FAST = 1  # queued, but takes almost no time: many per message
    SLOW = 2  # calls a provider or runs a process: takes a slot


@dataclass(frozen=True, slots=True)
class Row:
    """A step at creation.  `successors` are rows of the same run, ascending.

    `parent` is the row of the composite that expanded into this one, `position` its item or iteration there.  `grouped`
    rows are the heads of a matched fan-out: they travel as one canvas and are never handed over in place.
    """

    row: int
    node: int
    deps_left: int
    successors: Sequence[int]
    weight: Weight
    queue: int
    grouped: bool = False
    parent: int | None = None
    position: int | None = None
    status: StepStatus | None = None
    """Set only if it differs from what `deps_left` implies: rows adopted from an earlier run start as finished."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A step that this worker holds while its lease is valid and `token` is the newest."""

    id: int
    token: int
    node: int
    weight: int
    queue: int
    attempt: int
    parent: int | None
    position: int | None
    crashes: int
    unmet: bool = True
    """A dependency has not succeeded, or this was not checked."""

    @property
    def run(self) -> int:
        """The run's number."""
        return self.id >> ROW_BITS

    @property
    def row(self) -> int:
        """The row within the run."""
        return self.id & ROW_MASK


@dataclass(frozen=True, slots=True)
class ReadyStep:
    """A ready step whose message must still be sent."""

    id: int
    node: int
    weight: int
    queue: int
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class Event:
    """An event that was sent to a run.  `data` is any JSON value."""

    data: Any
    at: datetime


@dataclass(frozen=True, slots=True)
class Result:
    """How a step ended, as its checkpoint stores it.  `output` is any JSON value; times use the worker's clock."""

    status: StepStatus
    output: Any = None
    error: Mapping[str, Any] | None = None
    reason: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    """provider, model, role, exit_code, stderr, message (checkpoints): fields that only some kinds have."""
    attempts: int = 1
    calls: Sequence[CallRecord] = ()
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """A claimed step and how it ended.

    `skipped`: the step's descendants that can no longer run and end with it, row → reason.
    """

    step: Claimed
    result: Result
    skipped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class BudgetRequest:
    """What a parked step waits for on a budget: this many micro-dollars and tokens on the account `period`.

    `patient`: it waits for the account's next period.
    """

    period: int
    usd: int
    tokens: int
    patient: bool = False


@dataclass(frozen=True, slots=True)
class ClaimCapacity:
    """How much a worker may take over in place: `fast` inline and fast steps, `slow` ones, `pull` from the backlog."""

    fast: int = 64
    slow: int = 0
    pull: int = 0


@dataclass(slots=True)
class TransitionResult:
    """The result of one transaction: steps that this worker now holds, and steps that need a message.

    `refused` are the finishes that the fence rejected: another worker holds the step, or it has ended.
    """

    mine: list[Claimed] = field(default_factory=list)
    ready: list[ReadyStep] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    """Ready slow steps of runs with `max_parallel`; `admit` claims those that the run has room for."""
    suspects: list[int] = field(default_factory=list)
    """Ready steps whose workers died; they are claimed one at a time, by requests with `suspects`."""
    lapsed: bool = False
    """The worker's lease has expired, so nothing was claimed.  Its finishes still count."""
    doubtful: bool = False
    """The transaction was repeated because its reply was lost.  It may have been committed twice, leaving claims that
    no process knows of.
    """


@dataclass(slots=True)
class ClaimResult:
    """The result of `admit`: steps that this worker now holds, steps that need a message, steps that keep waiting."""

    mine: list[Claimed] = field(default_factory=list)
    ready: list[ReadyStep] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


# Answers of the store.  Each has its own type: a lost claim must never look like a stopped run.


class Refusal(Enum):
    """Why a claimed step could not be changed."""

    LOST = "lost"
    """The claim is no longer valid: the step is ready again, another worker has it, or it has ended.  This worker has
    nothing left to do for it.
    """
    STOPPED = "stopped"
    """The claim is valid, but the run (or the group around the step) has stopped: the step must be cancelled."""


class Renewal(Enum):
    """The result of a heartbeat."""

    RENEWED = "renewed"
    REVIVED = "revived"
    """The lease had expired, and the worker's steps were taken from it.  The worker is alive again."""
    UNKNOWN = "unknown"
    """The worker is no longer registered and cannot claim anything."""


@dataclass(frozen=True, slots=True)
class Released:
    """A claimed step was given back: it is ready and needs a message."""

    head: ReadyStep


@dataclass(frozen=True, slots=True)
class Buried:
    """A step of a stopped run was cancelled; `ready` are the steps that its end made ready."""

    ready: Sequence[ReadyStep]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A claimed step is now waiting."""


@dataclass(frozen=True, slots=True)
class Children:
    """A composite was expanded; `base` is its first child's row, `ready` are the children that may start."""

    ready: Sequence[ReadyStep]
    base: int


@dataclass(frozen=True, slots=True)
class RunClosed:
    """A run has ended; `ready` are the first steps of runs that waited for its concurrency key."""

    ready: Sequence[ReadyStep]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was taken back from dead workers.

    `again`: steps that are ready again.  `freed`: steps made ready by the cancellation of others, whose run had
    stopped.
    """

    again: Sequence[ReadyStep] = ()
    freed: Sequence[ReadyStep] = ()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished step as stored."""

    id: int
    status: StepStatus
    output: Any
    error: Mapping[str, Any] | None
    reason: str | None
    detail: Mapping[str, Any]
    attempts: int
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Expansion:
    """How a composite step was expanded: its children are rows `base … base + count - 1`, in order.

    phase: `item` (a map's items), `body` (a loop's iteration `round`), `steps` (a group's), `fallback`.  `items` are
    the map's values.  `reduce` is the row of a map's reduce, None if it has none.
    """

    id: int
    phase: str
    base: int
    count: int
    round: int = 0
    items: Sequence[Any] = ()
    reduce: int | None = None


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What a worker needs to know about a run; it does not change during the run."""

    id: int
    public_id: str
    org: int
    team: str
    workflow: str
    plan_hash: str
    inputs: Mapping[str, Any]
    target: str
    home: str
    root: int
    created_at: datetime
    key_at: datetime | None = None
    """When the run was granted its concurrency key, if it has one; it waited until then."""
    trace_id: str | None = None
    """The trace (W3C Trace Context) that the run belongs to."""


@dataclass(frozen=True, slots=True)
class KeyRequest:
    """The concurrency key that a run asks for.

    `most`: how many runs may hold it.  `on_conflict`: queue | reject | cancel_running.
    """

    key: str
    most: int = 1
    on_conflict: str = "queue"


@dataclass(frozen=True, slots=True)
class KeyDecision:
    """Whether a run may start (`holds`), and the runs to cancel so that it can."""

    holds: bool
    evict: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Activity:
    """The activity in a home's unfinished runs.

    `busy`: some step is ready, running or on the backlog, or waits for other runs or steps.  `next`: seconds until the
    message of a ready step may be lost, or a waiting step or a run's time limit is due, negative if it is overdue; None
    if nothing will become due.  `pressing`: a pass has something to do now, whatever `next` says: a worker has died, or
    steps are on the backlog or wait for other runs or steps.
    """

    busy: bool
    next: float | None
    pressing: bool = False


@dataclass(frozen=True, slots=True)
class KeyState:
    """What a sweep has to do for a concurrency key that runs wait for.

    `ready`: one of the waiting runs may start.  `evict`: runs to cancel for one of them.  `dead`: runs whose process
    died.
    """

    key: int
    ready: bool
    evict: Sequence[int]
    dead: Sequence[int]


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run about to be created.  `root`: the first of the runs that it continues.  `timeout` is in seconds."""

    public_id: str
    workflow: str
    plan_hash: str
    plan_body: str
    inputs: Mapping[str, Any]
    target: str
    created_at: datetime
    org: int = 1
    team: str = "default"
    home: str = ""
    root: int | None = None
    resumed_from: int | None = None
    idempotency_key: str | None = None
    request_hash: str | None = None
    timeout: float | None = None
    hold: KeyRequest | None = None
    max_parallel: int | None = None
    trace_id: str | None = None
