"""Protocols of the store and of the canvas, as the engine uses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from gorgon_common.costs.usage import CallRecord
from gorgon_common.engine.outcomes import Snoozed
from gorgon_common.engine.records import (
    Activity,
    Buried,
    Children,
    ClaimCapacity,
    Claimed,
    ClaimResult,
    Finish,
    KeyState,
    ReadyStep,
    Recovered,
    Refusal,
    Released,
    Row,
    RunClosed,
    TransitionResult,
    Waiting,
    Weight,
)
from gorgon_common.engine.states import RunStatus

if TYPE_CHECKING:
    from gorgon_common.engine.context import Run


class Member(Protocol):
    """A worker process registered in the store."""

    owner: int
    target: str
    home: str
    queues: list[int]


class Steps(Protocol):
    """The store as the machine uses it.  Each call is one transaction; all raise Unavailable."""

    def claim_and_finish(
        self,
        worker: Any,
        keep: ClaimCapacity,
        *,
        claims: Sequence[int] = (),
        finishes: Sequence[Finish] = (),
        suspects: bool = False,
    ) -> TransitionResult:
        """Claim and finish steps.  Steps that become ready are taken over as `keep` allows, and otherwise reported."""
        ...

    def claim_limited(
        self,
        worker: Any,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> ClaimResult:
        """Claim slow steps of a run with `max_parallel`, as far as it has room: `ids`, and steps that are waiting."""
        ...

    def release(
        self, step: Claimed, *, weight: Weight | None = None, crashed: str | None = None
    ) -> Released | Buried | Refusal:
        """Give a claimed step back.  `crashed`: the error that broke it; it counts as if its worker had died."""
        ...

    def owned(self, worker: Any) -> list[Claimed]:
        """Return the steps that a worker holds."""
        ...

    def park(self, step: Claimed, snoozed: Snoozed) -> Waiting | Refusal:
        """Make a claimed step wait."""
        ...

    def tell(
        self, run: int, row: int | None, kind: str, message: str | None, data: Mapping[str, Any] | None = None
    ) -> None:
        """Append an entry to the run's journal."""
        ...

    def wake(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Make ready the waiting steps whose time has come."""
        ...

    def expand(
        self,
        step: Claimed,
        rows: Sequence[Row],
        *,
        phase: str,
        round: int = 0,
        items: Sequence[Any] | None = None,
        window: int | None = None,
        reduce: int | None = None,
        calls: Sequence[CallRecord] = (),
    ) -> Children | Refusal:
        """Expand a claimed composite into its children."""
        ...

    def fail(
        self,
        worker: Any,
        keep: ClaimCapacity,
        finish: Finish,
        *,
        container: int,
        keeps: frozenset[int],
        run_fails: bool,
    ) -> TransitionResult:
        """Finish a failed step and stop the run or composite around it."""
        ...

    def finish_run(
        self, worker: Any, finish: Finish, *, status: RunStatus, outputs: Any, error: Mapping[str, Any] | None
    ) -> RunClosed | Refusal:
        """Finish the run's last step, and with it the run."""
        ...


class DispatchStore(Protocol):
    """The store as the publisher and the sweep use it."""

    def attach(self, ids: Sequence[int]) -> None:
        """Mark pending steps whose message a canvas will send."""
        ...

    def detach(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Detach steps from their canvas; returns those that are already ready."""
        ...

    def detach_all(self, *, home: str, target: str | None = None) -> None:
        """Detach every step of the live runs from its canvas, because the broker has lost all canvases."""
        ...

    def enqueue(self, heads: Sequence[ReadyStep], team: str, *, first: bool = False) -> None:
        """Put ready steps on the backlog."""
        ...

    def dequeue(self, queue: int, count: int, *, target: str, home: str) -> list[ReadyStep]:
        """Take a queue's next steps from the backlog."""
        ...

    def shelved(self) -> dict[int, int]:
        """Return queue → steps on the backlog."""
        ...

    def redispatch(self, ids: Sequence[int]) -> list[int]:
        """Record that messages of ready steps are sent again; returns the steps that are still ready."""
        ...

    def slots(self, target: str, home: str) -> dict[int, int]:
        """Return queue → slots of the live workers that serve it."""
        ...

    def lead(self, name: str, owner: str, seconds: float) -> bool:
        """Become or remain the leader of a job."""
        ...

    def leads_for(self, name: str) -> float:
        """Return for how many more seconds a job's leader holds its lease; 0 if there is no leader."""
        ...

    def activity(self, *, home: str, target: str) -> Activity:
        """Return the activity in a home's live runs."""
        ...

    def reap(
        self, *, home: str, target: str | None = None, sparing: int | None = None, thorough: bool = True
    ) -> Recovered:
        """Take back the steps of dead workers, except those of worker `sparing`."""
        ...

    def overdue(
        self, *, home: str, target: str | None = None, limit: int = 2000, all_ready: bool = False
    ) -> tuple[list[tuple[ReadyStep, datetime]], list[int]]:
        """Return ready steps whose message may be lost, and waiting steps to wake."""
        ...

    def wake(self, ids: Sequence[int]) -> list[ReadyStep]:
        """Make ready the waiting steps whose time has come."""
        ...

    def expired_runs(self, *, home: str, target: str | None = None) -> list[int]:
        """Return the live runs that have exceeded their time limit."""
        ...

    def held_runs(self, *, home: str, target: str) -> list[int]:
        """Return the runs with `max_parallel` that have waiting steps."""
        ...

    def claim_limited(
        self,
        worker: Any,
        run: int,
        ids: Sequence[int] = (),
        *,
        follows: Sequence[int] = (),
        free: int = 0,
        suspects: bool = False,
    ) -> ClaimResult:
        """Claim slow steps of a run with `max_parallel` as it has room; without a worker they need a message."""
        ...

    def turns(self, *, home: str, target: str) -> list[KeyState]:
        """Return the work to do for concurrency keys that runs wait for."""
        ...

    def take_turn(self, key: int, *, home: str) -> list[ReadyStep]:
        """Grant a concurrency key to the runs that are next."""
        ...

    def close_orphan(self, run: int, *, cancelled: bool = False) -> bool:
        """End a run whose process died; returns whether that was the case."""
        ...

    def watermarks(self, *, home: str, target: str | None = None) -> dict[int, float]:
        """Return queue → when the newest message that a worker has claimed was sent."""
        ...

    def stop(
        self, run: int, *, gate: int, keeps: frozenset[int], error: Mapping[str, Any] | None, reason: str
    ) -> list[ReadyStep]:
        """Cancel or fail a run."""
        ...


@dataclass(frozen=True, slots=True)
class Lowered:
    """What to send for some ready steps: a canvas in the adapter's own form.

    `carried`: pending steps whose message the canvas itself will send; `dropped`: steps that no canvas will send any
    longer, because one of their members travels alone.
    """

    canvas: Any
    carried: Sequence[int] = ()
    dropped: Sequence[int] = ()


class Canvas(Protocol):
    """Creates and sends messages: the Celery adapter."""

    def lower(self, run: Run, heads: Sequence[ReadyStep], join: int | None) -> Lowered:
        """Return the canvas for ready steps of one run; `join`: the step id of the reduce that they lead to."""
        ...

    def send(self, lowered: Lowered) -> None:
        """Publish it.  Raises Unavailable."""
        ...

    def depth(self, queue: int) -> int:
        """Return how many messages a queue holds.  Raises Unavailable."""
        ...

    def epoch(self) -> str | None:
        """Return a marker that vanishes with the broker's messages (setting one if missing), or None if impossible."""
        ...
