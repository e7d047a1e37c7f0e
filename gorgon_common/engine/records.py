"""What passes between the engine, the store and the workers: plain, immutable records.

A step's id is `run << 20 | row`: a run has at most 1,048,576 rows, and a row's run needs no look-up.
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
    """Return the id of a run's row."""
    return run << ROW_BITS | row


class Weight(IntEnum):
    """What a step costs a worker."""

    INLINE = 0  # needs no provider: executed by whoever makes it ready
    FAST = 1  # queued, but takes no time: many to a message
    SLOW = 2  # calls a provider or runs a process: takes a slot


@dataclass(frozen=True, slots=True)
class Row:
    """A step as it is created.  `successors` are rows of the same run, ascending.

    `parent` is the row of the composite that expanded into this one, `position` its item or iteration there.
    `grouped` rows are heads of a matched fan-out: they travel as one canvas and are never handed over in place.
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
    """Only where it is not what `deps_left` says: rows adopted from an earlier run are finished from the start."""


@dataclass(frozen=True, slots=True)
class Claimed:
    """A step that this worker holds, as long as its lease lives and `token` is the newest."""

    id: int
    token: int
    node: int
    weight: int
    queue: int
    attempt: int
    parent: int | None
    position: int | None
    crashes: int

    @property
    def run(self) -> int:
        """The run's number."""
        return self.id >> ROW_BITS

    @property
    def row(self) -> int:
        """The row within the run."""
        return self.id & ROW_MASK


@dataclass(frozen=True, slots=True)
class Head:
    """A step that is ready and owed a message."""

    id: int
    node: int
    weight: int
    queue: int
    crashes: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """How a step ended: what its checkpoint stores.  `output` is any JSON value; times are the worker's clock."""

    status: StepStatus
    output: Any = None
    error: Mapping[str, Any] | None = None
    reason: str | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)
    """provider, model, role, exit_code, stderr, message (checkpoints): what only some kinds have."""
    attempts: int = 1
    calls: Sequence[CallRecord] = ()
    started_at: datetime | None = None
    finished_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Finish:
    """A claimed step and how it ended.

    `skipped`: rows that the step takes with it, row → reason: its descendants that can no longer run.
    """

    step: Claimed
    result: Result
    skipped: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Room:
    """What a parked step waits for on a budget: so many micro-dollars and tokens on the account `period`.

    `patient`: until its next period begins.
    """

    period: int
    usd: int
    tokens: int
    patient: bool = False


@dataclass(frozen=True, slots=True)
class Keep:
    """How much a worker may take over in place: `fast` inline and fast steps, `slow` ones, `pull` from the backlog."""

    fast: int = 64
    slow: int = 0
    pull: int = 0


@dataclass(slots=True)
class Advance:
    """What one transaction brought: steps that this worker now holds, and heads that are owed a message.

    `refused` are the finishes that the fence turned away: somebody else holds the step, or it is finished.
    """

    mine: list[Claimed] = field(default_factory=list)
    ready: list[Head] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    counted: list[int] = field(default_factory=list)
    """Ready slow steps of runs with `max_parallel`: `admit` claims those for which there is room."""
    suspects: list[int] = field(default_factory=list)
    """Ready steps whose workers died: they are claimed one at a time, where `suspects` is asked for."""
    lapsed: bool = False
    """The worker's lease has run out: nothing was claimed for it.  What it has finished counts."""
    doubtful: bool = False
    """The transaction was made again because its reply got lost: it may have been committed twice over, with claims of
    which nobody knows."""


@dataclass(slots=True)
class Admitted:
    """What `admit` brought: steps that this worker now holds, heads that are owed a message, steps that wait on."""

    mine: list[Claimed] = field(default_factory=list)
    ready: list[Head] = field(default_factory=list)
    held: list[int] = field(default_factory=list)


# What the store answers.  Each answer has a type of its own: a lost claim must never look like a stopped run.


class Refusal(Enum):
    """Why a claimed step could not be changed."""

    LOST = "lost"
    """The claim does not hold any more: the step is ready again, another worker has it, or it has ended.  Nothing
    is to be done for it here."""
    STOPPED = "stopped"
    """The claim holds, but the run (or the group around the step) has stopped: the step is to be cancelled."""


class Renewal(Enum):
    """What a heartbeat has found."""

    RENEWED = "renewed"
    REVIVED = "revived"
    """The lease had run out, and the worker's steps were taken from it.  It lives again."""
    UNKNOWN = "unknown"
    """The worker is not registered any more: it can claim nothing."""


@dataclass(frozen=True, slots=True)
class Released:
    """A claimed step was given back: it is ready, and owed a message."""

    head: Head


@dataclass(frozen=True, slots=True)
class Buried:
    """A step whose run had stopped was cancelled; `ready` are steps that its end made ready."""

    ready: Sequence[Head]


@dataclass(frozen=True, slots=True)
class Waiting:
    """A claimed step waits now."""


@dataclass(frozen=True, slots=True)
class Children:
    """A composite was expanded; `base` is its first child's row, `ready` those of its children that may start."""

    ready: Sequence[Head]
    base: int


@dataclass(frozen=True, slots=True)
class RunClosed:
    """A run has ended; `ready` are the first steps of runs that waited for its concurrency key."""

    ready: Sequence[Head]


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was taken back from dead workers: steps that are ready again, and steps that the end of others (whose run
    had stopped) has made ready.
    """

    again: Sequence[Head] = ()
    freed: Sequence[Head] = ()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A finished step as it was stored."""

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

    phase: `item` (a map's items), `body` (a loop's iteration `round`), `steps` (a group's), `fallback`.
    `items` are the map's values.  `reduce` is the row of a map's reduce, None where there is none.
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
    """What a worker needs to know of a run; it does not change while the run lives."""

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
    """When it got its concurrency key, where it has one: it waited until then."""
    trace_id: str | None = None
    """The trace (W3C Trace Context) that it is part of."""


@dataclass(frozen=True, slots=True)
class Hold:
    """The concurrency key that a run asks for.

    `most`: how many runs may hold it.  `on_conflict`: queue | reject | cancel_running.
    """

    key: str
    most: int = 1
    on_conflict: str = "queue"


@dataclass(frozen=True, slots=True)
class Admission:
    """Whether a run may start (`holds`), and the runs to be cancelled for it."""

    holds: bool
    evict: Sequence[int] = ()


@dataclass(frozen=True, slots=True)
class Activity:
    """What is going on in the runs of a home that have not ended.

    `busy`: steps are ready or running, on the backlog, or wait for other runs or steps.  `next`: seconds until the
    message of a ready step may be lost, or a waiting step or the time limit of a run is due, below 0 where it is
    already; None where nothing will be.  `pressing`: there is something for a pass to do now, whatever `next` says: a
    worker has died, or steps are on the backlog or wait for other runs or steps.
    """

    busy: bool
    next: float | None
    pressing: bool = False


@dataclass(frozen=True, slots=True)
class Turn:
    """What a sweep has to do for a concurrency key that runs wait for.

    `ready`: one of them may start.  `evict`: runs to be cancelled for one of them.  `dead`: runs whose process died.
    """

    key: int
    ready: bool
    evict: Sequence[int]
    dead: Sequence[int]


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run that is about to be created.  `root`: the first of the runs that it continues.  `timeout` in seconds."""

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
    hold: Hold | None = None
    max_parallel: int | None = None
    trace_id: str | None = None
